"""Training 4M on a published token set: recipes, the task of the one trainer, the finished run.

    runs/<run>/run.json            recipe, data and result, written last
    runs/<run>/model/              the checkpoint in its released form
    runs/<run>/curve.jsonl         the loss curve
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from infra.manifest import Manifest
from infra.store import Store
from models.fourm.draws import Draws
from models.fourm.loader import TokenDataset, base_name
from models.fourm.masking import Component, Mixture, mask_batch, transfer_batch
from models.fourm.spec import CHUNKS, FourMConfig, ModalitySpec
from tasks.recipes import TrainRecipe
from tasks.run_store import Checkpoints
from tasks.trainer import ProgressCallback, Task, Trainer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from models.fourm.batch import Batch

logger = logging.getLogger("fourm.train")

PIXELS = "rgb"
PATCH = 16
SEQUENCES = ("caption", "det")
_VAL_BATCH = 32


@dataclass(frozen=True)
class RunInfo:
    """A finished training: its folder, optimizer steps, wall seconds of the call that finished it,
    samples/s of that call, last metrics (training means, then `val/...` per-token losses), steps
    skipped for non-finite gradients."""

    path: str
    steps: int
    seconds: float
    samples_per_second: float
    metrics: dict[str, float]
    skipped: int


def modality_specs(manifest: Manifest, *, max_text: int) -> tuple[ModalitySpec, ...]:
    """The modalities a manifest offers, as a model sees them. Feature vectors are told by
    `channels` (their width) in the manifest's entry, beside `num_tokens`, the most of a sample.

    Args:
        manifest: A published token set.
        max_text: Longest sequence of text in tokens, [EOS] included.

    Raises:
        ValueError: a modality has no tokenizer in the manifest.
    """
    size = manifest.meta["crops"]["size"]
    specs = []
    for name in sorted(manifest.modalities):
        if name == PIXELS:
            specs.append(ModalitySpec(name=f"{name}@{size}", kind="pixels", patch_size=PATCH,
                                      max_tokens=(size // PATCH) ** 2, is_target=False))
            continue
        key = "text" if name in SEQUENCES else name.removeprefix("tok_")
        if key not in manifest.tokenizers:
            raise ValueError(f"{manifest.name} v{manifest.version} names no tokenizer of {name}; "
                             f"it has {', '.join(sorted(manifest.tokenizers))}")
        if "channels" in manifest.tokenizers[key]:  # feature vectors, taken as they are
            specs.append(ModalitySpec(name=name, kind="seq_emb", is_target=False,
                                      max_tokens=int(manifest.tokenizers[key]["num_tokens"]),
                                      channels=int(manifest.tokenizers[key]["channels"])))
            continue
        vocab = int(manifest.tokenizers[key]["vocab_size"])
        if name in SEQUENCES:
            specs.append(ModalitySpec(name=name, kind="seq", vocab_size=vocab,
                                      max_tokens=max_text, chunk=CHUNKS.get(name, 0)))
        else:
            tokens = int(manifest.tokenizers[key]["num_tokens"])
            specs.append(ModalitySpec(name=f"{name}@{size}", kind="img", vocab_size=vocab,
                                      max_tokens=tokens))
    return tuple(specs)


def resolve(mixture: Mixture, config: FourMConfig) -> Mixture:
    """Expands base names and "*" (all others) of a mixture to the modalities of a model.

    Raises:
        ValueError: a modality is unknown, or a component asks for more tokens than its modalities
            can ever hold.
    """
    parts = []
    for component in mixture.components:
        inputs = _expand(component.inputs, config.inputs)
        targets = _expand(component.targets, config.targets)
        for kind, names, least in (("input", inputs, component.num_inputs[0]),
                                   ("target", targets, component.num_targets[0])):
            room = sum(config.by_name[name].max_tokens for name in names)
            if least > room:
                raise ValueError(f"no batch can hold {least} {kind} tokens of {', '.join(names)}: "
                                 f"together they have {room}; lower num_{kind}s")
        least = _expand(component.least, config.inputs)
        parts.append(Component(**{**vars(component), "inputs": inputs, "targets": targets,
                                  "least": least}))
    return Mixture(components=tuple(parts), per_batch=mixture.per_batch)


def _expand(
    alphas: Mapping[str, float], specs: tuple[ModalitySpec, ...]
) -> dict[str, Any]:
    names = {base_name(spec.name): spec.name for spec in specs}
    unknown = sorted(alphas.keys() - names.keys() - {"*"})
    if unknown:
        raise ValueError(f"the mixture names {', '.join(unknown)}; choose from "
                         f"{', '.join(sorted(names))} or *")
    rest = dict.fromkeys(names, alphas["*"]) if "*" in alphas else {}
    chosen = {**rest, **{name: alpha for name, alpha in alphas.items() if name != "*"}}
    return {names[name]: alpha for name, alpha in chosen.items() if alpha > 0}


class FourMTask(Task):
    """4M pre-training on a manifest. Raises ValueError for a recipe the data cannot serve."""

    def __init__(self, store: Store, manifest: Manifest, recipe: TrainRecipe) -> None:
        self.store, self.manifest, self.recipe = store, manifest, recipe
        specs = modality_specs(manifest, max_text=recipe.max_text)
        self.config = FourMConfig(modalities=specs, **recipe.network)
        self.mixture = resolve(recipe.mixture, self.config)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("data", "validation")}

    @cached_property
    def data(self) -> TokenDataset:
        """The training split."""
        return TokenDataset(self.store, self.manifest, "train", self.config.modalities,
                            seed=self.recipe.training.seed)

    @cached_property
    def validation(self) -> list[tuple[str, Batch]]:
        """Fixed masks over fixed samples: every target from the pixels (or, without pixels, from
        all that is left), whole."""
        if not self.manifest.splits.get("val"):
            return []
        held_out = TokenDataset(self.store, self.manifest, "val", self.config.modalities, crops=1)
        count = min(self.recipe.val_samples, len(held_out))
        batches = []
        for first in range(0, count, _VAL_BATCH):
            samples = held_out.fixed(first, min(_VAL_BATCH, count - first))
            draws = Draws(0, 0, len(samples))
            for target in self.config.targets:
                inputs = self._sources(target)
                name = f"val/{inputs[0].split('@')[0]}->{base_name(target.name)}"
                batches.append((name, transfer_batch(self.config, samples, inputs, [target.name],
                                                     draws)))
        return batches

    def _sources(self, target: ModalitySpec) -> list[str]:
        pixels = [m.name for m in self.config.inputs if m.kind == "pixels"]
        return pixels or [m.name for m in self.config.inputs if m.name != target.name]

    def build_model(self) -> nn.Module:
        """A fresh network."""
        from models.fourm.model import FourM

        return FourM(self.config)

    def batch(self, step: int, rank: int, world: int) -> Batch:
        """Rows rank::world of the masked batch of `step`."""
        training = self.recipe.training
        rows = slice(rank, None, world)
        samples = self.data.batch_at(step, training.batch_size, rows)
        draws = Draws(training.seed, step, training.batch_size, rows)
        return mask_batch(self.config, samples, self.mixture, draws)

    def loss(
        self, model: nn.Module, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of the batch; modalities a component leaves out are not logged for it."""
        losses = model(batch)
        counts = zip(self.config.modalities, batch.counts, strict=True)
        seen = {spec.name: losses.per_modality[spec.name].detach()
                for spec, count in counts if count}
        return losses.total, {f"loss/{base_name(name)}": value for name, value in seen.items()}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean token loss of every target on the validation split, in nats."""
        device = next(model.parameters()).device
        sums: dict[str, float] = {}
        rows: dict[str, int] = {}
        for name, batch in self.validation:
            count = sum(batch.counts)
            found = model(batch.to(device)).per_modality
            value = sum(float(loss) for loss in found.values())  # one target: the others are 0
            sums[name] = sums.get(name, 0.0) + value * count
            rows[name] = rows.get(name, 0) + count
        return {name: sums[name] / max(1, rows[name]) for name in sums}

    def is_hidden(self, name: str) -> bool:
        """Matrices of the blocks, where the recipe gives them to Muon."""
        return self.recipe.muon and name.startswith(("encoder.", "decoder."))


def train_fourm(
    store: Store, manifest: Manifest, recipe: TrainRecipe, *, run: str, num_workers: int = 0,
    on_progress: ProgressCallback | None = None,
) -> RunInfo:
    """Trains `recipe` on `manifest` and stores the model under `runs/<run>/model`.

    A run that is finished is returned at once, one that was cut off goes on from its newest
    checkpoint.

    Args:
        store: The dataset.
        manifest: The token set.
        recipe: Network, masking and training.
        run: Name of the run.
        num_workers: Ray Train workers with DDP; 0 trains in this process.
        on_progress: Called with (step, steps, metrics) at the points of the loss curve.

    Raises:
        ValueError: the data cannot serve the recipe, or a run of this name has other settings.
    """
    path = f"runs/{run}"
    identity = {"manifest": [manifest.name, manifest.version], "recipe": asdict(recipe)}
    identity = _jsonable(identity)
    finished = _finished(store, path, identity)
    if finished:
        return finished
    task = FourMTask(store, manifest, recipe)
    _ = task.data, task.validation  # refuses a set that does not fit before anything starts
    result_model, result = _fit(store, path, task, num_workers, on_progress)
    for name, data in _files(result_model).items():
        store.write(f"{path}/model/{name}", data)
    info = RunInfo(path, result.steps, round(result.seconds, 2),
                   round(result.samples_per_second, 2), result.metrics, result.skipped)
    store.write_json(f"{path}/run.json", {**identity, "result": asdict(info)})
    Checkpoints(store, path).clear()
    return info


def _fit(
    store: Store, path: str, task: FourMTask, num_workers: int,
    on_progress: ProgressCallback | None,
) -> tuple[Any, Any]:
    if not num_workers:
        result = Trainer(store, path, task, task.recipe.training).fit(on_progress)
        return result.model, result
    from tasks.distributed import fit_distributed

    result = fit_distributed(
        store, path, task, task.recipe.training, num_workers, on_progress
    )
    newest = Checkpoints(store, path).newest()
    assert newest is not None
    model = task.build_model()
    model.load_state_dict(newest[0]["model"], strict=False)
    return model, result


def _files(model: Any) -> dict[str, bytes]:
    from models.fourm.checkpoint import files

    return files(model)


def _finished(store: Store, path: str, identity: dict[str, Any]) -> RunInfo | None:
    if not store.exists(f"{path}/run.json"):
        return None
    record = store.read_json(f"{path}/run.json")
    for part, value in identity.items():
        if record[part] != value:
            raise ValueError(f"{path} was trained with another {part}; choose another run name")
    return RunInfo(**record["result"])


def _jsonable(value: Any) -> Any:
    import json

    return json.loads(json.dumps(value))
