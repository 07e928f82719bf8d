"""Training 4M on a published token set: recipes, the task of the one trainer, the finished run.

    runs/<run>/run.json            recipe, data and result, written last
    runs/<run>/model/              the checkpoint in its released form
    runs/<run>/curve.jsonl         the loss curve
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from infra.manifest import Manifest
from infra.store import Store
from infra.strict import known
from models.fourm.draws import STREAMS, Draws
from models.fourm.loader import stored_name
from models.fourm.masking import mask_batch, transfer_batch
from models.fourm.spec import FourMConfig, ModalitySpec
from tasks.flops import Load, fourm_load
from tasks.mixture import (
    Bound,
    MixedData,
    SetOf,
    bind,
    joint_mixture,
    open_split,
    shared_specs,
)
from tasks.recipes import TrainRecipe, described
from tasks.run_store import Checkpoints
from tasks.specs import modality_specs, resolve
from tasks.trainer import ProgressCallback, Task, Trainer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from models.fourm.batch import Batch

logger = logging.getLogger("fourm.train")

__all__ = ["FourMTask", "RunInfo", "modality_specs", "train_fourm"]

FRESH = "none"
"""Said in place of a checkpoint: begin with fresh weights."""
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


class FourMTask(Task):
    """4M training on manifests. Raises ValueError for a recipe the data cannot serve."""

    streams = STREAMS

    def __init__(
        self, store: Store, data: Manifest | Mapping[str, Sequence[SetOf]], recipe: TrainRecipe
    ) -> None:
        """`data` is one manifest of `store`, or the sets of each of the recipe's sources."""
        self.store, self.recipe = store, recipe
        if isinstance(data, Manifest):
            data = {recipe.all_sources[0].name: [(store, data)]}
        self.bound = bind(recipe, data)
        self.manifest = self.bound[0].sets[0][1]
        self.config = FourMConfig(modalities=shared_specs(self.bound), **recipe.network)
        self.mixture = joint_mixture(self.bound, self.config)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("data", "validation")}

    @cached_property
    def data(self) -> MixedData:
        """The training splits."""
        return MixedData(self.recipe, self.bound, self.config)

    @cached_property
    def validation(self) -> list[tuple[str, Batch]]:
        """Fixed masks over fixed samples of every source, see `fixed_batches`."""
        return [named for part in self.bound
                for named in fixed_batches(part, self.config, self.recipe)]

    def identity(self) -> dict[str, Any]:
        """Its data and its recipe, but for the settings of the training."""
        found = _identity(self)
        return {**found, "recipe": {name: value for name, value in found["recipe"].items()
                                    if name != "training"}}

    def build_model(self) -> nn.Module:
        """A fresh network, or the one to begin with, grown to the recipe's modalities."""
        from models.fourm.model import FourM
        from tasks.finetune import graft, read_start, tune

        model, recipe, fresh = FourM(self.config), self.recipe, tuple(self.config.by_name)
        if begins(recipe):
            fresh = graft(model, read_start(self.store, recipe.start), recipe.inherit)
        return tune(model, recipe, fresh)

    def check_start(self) -> None:
        """Refuses a checkpoint that does not fit, a recipe that needs one and has none, and parts
        to freeze that do not exist."""
        import torch

        from models.fourm.model import FourM
        from tasks.finetune import check_tuning, graft, read_start

        with torch.device("meta"):
            shapes = FourM(self.config)
        if begins(self.recipe):
            graft(shapes, read_start(self.store, self.recipe.start), self.recipe.inherit)
        check_tuning(shapes, self.recipe)

    def batch(self, step: int, rank: int, world: int) -> Batch:
        """Rows rank::world of the masked batch of `step`."""
        return self.data.batch(step, rank, world)

    def loss(
        self, model: nn.Module, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of the batch; modalities a component leaves out are not logged for it."""
        losses = model(batch)
        counts = zip(self.config.modalities, batch.counts, strict=True)
        seen = {spec.name: losses.per_modality[spec.name].detach()
                for spec, count in counts if count}
        shown = _shown_names(self.config)
        return losses.total, {f"loss/{shown[name]}": value for name, value in seen.items()}

    def load(self, batch: Batch) -> Load:
        """Tokens, slots and operations of a batch."""
        return fourm_load(self.config, batch)

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
        return {name: sums[name] / rows[name] for name in sums if rows[name]}

    def is_hidden(self, name: str) -> bool:
        """Matrices of the blocks, where the recipe gives them to Muon."""
        return (self.recipe.muon and name.startswith(("encoder.", "decoder."))
                and "lora_" not in name)


def begins(recipe: TrainRecipe) -> bool:
    """Whether a training begins with another model. Raises ValueError where the recipe, or what it
    updates, needs one and nothing says which."""
    if recipe.starts_from and not recipe.start:
        raise ValueError(f"the recipe begins with a model of {recipe.starts_from}: say which with "
                         f"--start RUN-OR-FOLDER, or --start {FRESH} for fresh weights")
    begun = recipe.start not in ("", FRESH)
    if recipe.lora and not begun:
        raise ValueError("low-rank updates (--lora) change a trained model: say which with "
                         "--start RUN-OR-FOLDER")
    return begun


def fixed_batches(
    part: Bound, config: FourMConfig, recipe: TrainRecipe
) -> Iterator[tuple[str, Batch]]:
    """The validation of one source as (name of the loss, batch): every target from the pixels (or,
    without pixels, from all that is left), whole. A target that is alone in its source is masked
    as in training, the same way each time."""
    if not all(map(_held_out, (manifest for _, manifest in part.sets))):
        return
    held_out = open_split(part, "val", crops=1)
    prefix = f"val/{part.source.name}/" if recipe.sources else "val/"
    mixture = resolve(part.source.mixture, config, part.names)
    count, shown = min(recipe.val_samples, len(held_out)), _shown_names(config)
    for first in range(0, count, _VAL_BATCH):
        samples = held_out.fixed(first, min(_VAL_BATCH, count - first))
        draws = Draws(0, 0, len(samples))
        for target in config.targets:
            if target.name not in part.names:
                continue
            inputs = _sources(config, part, target)
            name = shown[target.name]
            if inputs:
                yield (f"{prefix}{shown[inputs[0]]}->{name}",
                       transfer_batch(config, samples, inputs, [target.name], draws))
            else:
                again = Draws(0, first, len(samples))
                yield f"{prefix}{name}", mask_batch(config, samples, mixture, again)


def _held_out(manifest: Manifest) -> int:
    """Samples of its validation split."""
    return sum(manifest.samples(shard) for shard in manifest.splits.get("val", ()))


def _shown_names(config: FourMConfig) -> dict[str, str]:
    """Names of modalities in curves: without the resolution, as long as that tells them apart."""
    bases = Counter(stored_name(name) for name in config.by_name)
    return {name: stored_name(name) if bases[stored_name(name)] == 1 else name
            for name in config.by_name}


def _sources(config: FourMConfig, part: Bound, target: ModalitySpec) -> list[str]:
    held = [m for m in config.inputs if m.name in part.names]
    pixels = [m.name for m in held if m.kind == "pixels"]
    return pixels or [m.name for m in held if m.name != target.name]


def train_fourm(
    store: Store, data: Manifest | Mapping[str, Sequence[SetOf]], recipe: TrainRecipe, *, run: str,
    num_workers: int = 0, on_progress: ProgressCallback | None = None, on_gpus: bool = False,
) -> RunInfo:
    """Trains `recipe` on `data` and stores the model under `runs/<run>/model`.

    A run that is finished is returned at once, one that was cut off goes on from its newest
    checkpoint.

    Args:
        store: The dataset.
        data: The token set, or those of each of the recipe's sources.
        recipe: Network, masking and training.
        run: Name of the run.
        num_workers: Ray Train workers with DDP; 0 trains in this process.
        on_progress: Called with (step, steps, metrics) at the points of the loss curve.
        on_gpus: Those workers wait for a GPU each, where the cluster has none as yet.

    Raises:
        ValueError: the data cannot serve the recipe, or a run of this name has other settings.
    """
    path = f"runs/{run}"
    task = FourMTask(store, data, recipe)
    identity = _identity(task)
    finished_before = _finished(store, path, identity)
    if finished_before:
        return finished_before
    task.check_start()
    _ = task.data, task.validation  # refuses a set that does not fit before anything starts
    result_model, result = _fit(store, path, task, num_workers, on_progress, on_gpus)
    for name, content in _files(result_model).items():
        store.write(f"{path}/model/{name}", content)
    info = RunInfo(path, result.steps, round(result.seconds, 2),
                   round(result.samples_per_second, 2), result.metrics, result.skipped)
    store.write_json(f"{path}/run.json", {**identity, "result": asdict(info)})
    Checkpoints(store, path).clear()
    return info


def _fit(
    store: Store, path: str, task: FourMTask, num_workers: int,
    on_progress: ProgressCallback | None, on_gpus: bool,
) -> tuple[Any, Any]:
    if not num_workers:
        result = Trainer(store, path, task, task.recipe.training).fit(on_progress)
        return result.model, result
    from tasks.distributed import fit_distributed

    result = fit_distributed(
        store, path, task, task.recipe.training, num_workers, on_progress, on_gpus=on_gpus
    )
    newest = Checkpoints(store, path).newest()
    assert newest is not None
    model = task.build_model()
    model.load_state_dict(newest[0]["model"], strict=False)
    return model, result


def _files(model: Any) -> dict[str, bytes]:
    from models.fourm.checkpoint import files
    from tasks.finetune import finished

    return files(finished(model))


def _identity(task: FourMTask) -> dict[str, Any]:
    """What makes a run the same run: its data and its recipe, as JSON."""
    sets = {part.source.name: [[store.url, manifest.name, manifest.version]
                               for store, manifest in part.sets] for part in task.bound}
    found = {"manifest": [task.manifest.name, task.manifest.version],
             "recipe": described(task.recipe)}
    return {**found, "data": sets} if sum(map(len, sets.values())) > 1 else found


def _finished(store: Store, path: str, identity: dict[str, Any]) -> RunInfo | None:
    if not store.exists(f"{path}/run.json"):
        return None
    record = store.read_json(f"{path}/run.json")
    for part, value in identity.items():
        if record.get(part) != value:
            raise ValueError(f"{path} was trained with another {part}; choose another run name")
    return known(RunInfo, record["result"], store.full(f"{path}/run.json"))

