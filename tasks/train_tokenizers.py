"""Training tokenizers: labels of a few shards in, one folder a modality under `tokenizers/` out.

    <root>/tokenizers/depth@1f2e3d4c/{config.json,model.safetensors,info.json,health.json,...}
    <root>/tokenizers/text@5a6b7c8d/{tokenizer.json,info.json}

The eight digits hash recipe, labels and shards, so a rerun finds what is there and a changed
recipe never overwrites it. `info.json` is created last, and only then the tokenizer exists; a
killed training goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from infra import ui
from infra.ledger import Ledger, Stage
from infra.ray_session import Embedded, RayTarget, ray_session
from infra.store import Store
from infra.strict import known
from tasks.tokenizer_config import TextRecipe, TokenizerRecipe, identity
from tasks.tokenizer_data import load_crops, read_values
from tasks.tokenizer_health import HealthCheck, show_health
from tasks.tokenizer_task import reconstruction_task
from tasks.trainer import Trainer

if TYPE_CHECKING:
    from tokenizers_vq.tokenizer import Tokenizer

logger = logging.getLogger("fourm.tokenizers")

VERSION = 1
INFO = "info.json"
TEXT = "text"
_TOLD = ("caption", "det")  # what words and class names are learned from
_HELD_OUT = 200

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TokenizerInfo:
    """What a stored tokenizer is and how good it is."""

    modality: str
    path: str
    """Folder in the store."""
    fingerprint: str
    """sha256 of its files."""
    vocab_size: int
    num_tokens: int
    """Tokens of a sample; 0 where it varies."""
    metrics: dict[str, float]
    """Quality on held-out samples, code usage and perplexity."""
    seconds: float
    patch: int = 0
    """Pixels per token and side; 0 where the number of tokens does not depend on the size of the
    picture."""
    ordered: bool = False
    """Whether any first few tokens of a sample decode."""

    def length(self, size: int, kept: int = 0) -> int:
        """Tokens of a crop with a side of `size` pixels, of which the first `kept` are stored (0:
        all).

        Raises:
            ValueError: if fewer tokens than that would not decode, or the side is no multiple of a
                token's.
        """
        if self.patch and size % self.patch:
            raise ValueError(f"{self.modality}: a side of {size} px is no multiple of the "
                             f"{self.patch} px of a token")
        whole = (size // self.patch) ** 2 if self.patch else self.num_tokens
        if not kept:
            return whole
        if not self.ordered:
            raise ValueError(f"{self.modality}: the first {kept} of {whole} tokens on a grid do "
                             "not decode; train it with ordered tokens (registers)")
        if not 1 <= kept <= whole:
            raise ValueError(f"{self.modality}: {kept} tokens of the 1 to {whole} there are")
        return kept


def read_info(store: Store, path: str) -> TokenizerInfo:
    """The record of a stored tokenizer. Raises FileNotFoundError, or ValueError, with its URL."""
    name = f"{path}/{INFO}"
    return known(TokenizerInfo, store.read_json(name), store.full(name))


def tokenizer_path(
    name: str, recipe: TokenizerRecipe | TextRecipe, stages: Sequence[Stage], shards: Sequence[int]
) -> str:
    """Where the tokenizer of this recipe on these labels is stored."""
    content = {
        "version": VERSION,
        "recipe": identity(recipe),
        "stages": [stage.fingerprint for stage in stages],
        "shards": list(shards),
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"tokenizers/{name}@{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def text_path(
    stages: Mapping[str, Stage], recipe: TextRecipe, shards: Sequence[int]
) -> str:
    """Where the text tokenizer of this recipe on these labels is stored."""
    return tokenizer_path(TEXT, recipe, [stages[n] for n in _TOLD if n in stages], shards)


def train_tokenizers(
    store: Store,
    stages: Mapping[str, Stage],
    recipes: Mapping[str, TokenizerRecipe],
    *,
    shards: Sequence[int],
    text: TextRecipe | None = None,
    target: RayTarget | None = None,
    workers: int = 0,
    gpus: float = 0,
    on_progress: Progress | None = None,
) -> dict[str, TokenizerInfo]:
    """Trains what is not there yet and returns all tokenizers by modality.

    Args:
        store: The dataset.
        stages: Modality to the stage that wrote its values.
        recipes: Modality to the recipe of its learned tokenizer.
        shards: Shards whose labels are read; the last one is held out where there are several.
        text: Also trains the text tokenizer (key `text`) on `caption` and the classes of `det`.
        target: Where Ray runs, if `workers` is not 0.
        workers: Tokenizers trained at the same time, a core each; 0 trains one after another
            in this process.
        gpus: GPUs that each of them occupies on Ray, may be a fraction.
        on_progress: Called with (modality, step, steps), in this process only.

    Raises:
        ValueError: if a modality has no stage, its labels are all missing, or this machine's Ray
            is not given the GPUs that a tokenizer occupies.
    """
    if missing := sorted(recipes.keys() - stages.keys()):
        raise ValueError(f"no labels for {missing[0]!r}; labelled are {', '.join(sorted(stages))}")
    if not shards:
        raise ValueError("no shards to train tokenizers on: label some first")
    found: dict[str, TokenizerInfo] = {}
    if text is not None:
        found[TEXT] = train_text(store, stages, text, shards=shards)
    todo = {}
    for name, recipe in recipes.items():
        path = tokenizer_path(name, recipe, [stages[name]], shards)
        if store.exists(f"{path}/{INFO}"):
            found[name] = read_info(store, path)
        else:
            todo[name] = recipe
    if todo and workers:
        found |= _train_on_ray(
            store, stages, todo, shards, target or Embedded(), workers, gpus
        )
    for name in todo.keys() - found.keys():
        found[name] = train_tokenizer(
            store, name, stages[name], todo[name], shards=shards, on_progress=on_progress
        )
    for name in todo:
        show_health(store, name, found[name].path)
    ui.table("tokenizers", [_row(info) for info in found.values()], "Tokenizers")
    return found


def _row(info: TokenizerInfo) -> dict[str, Any]:
    metrics = {name: round(value, 4) for name, value in info.metrics.items()}
    return {"modality": info.modality, "codes": info.vocab_size, "path": info.path, **metrics}


def _train_on_ray(
    store: Store,
    stages: Mapping[str, Stage],
    recipes: Mapping[str, TokenizerRecipe],
    shards: Sequence[int],
    target: RayTarget,
    workers: int,
    gpus: float,
) -> dict[str, TokenizerInfo]:
    """One Ray task a tokenizer, at most `workers` at a time."""
    import ray

    if isinstance(target, Embedded) and gpus > target.gpus:
        raise target.too_small("a tokenizer", gpus, "GPU", target.gpus)  # a cluster may grow
    found: dict[str, TokenizerInfo] = {}
    with ray_session(target):
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=2)(train_tokenizer)
        waiting = list(recipes)
        running: dict[Any, str] = {}
        bar = ui.progress("train tokenizers")
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    name = waiting.pop(0)
                    ref = remote.remote(
                        store, name, stages[name], recipes[name], shards=list(shards), threads=1
                    )
                    running[ref] = name
                for ref in ray.wait(list(running), timeout=1.0)[0]:
                    found[running.pop(ref)] = ray.get(ref)
                names = ", ".join(running.values())
                bar.update(len(found), len(recipes), f"training {names}" if names else "")
        finally:
            for ref in running:
                ray.cancel(ref, force=True)
    return found


def train_tokenizer(
    store: Store,
    name: str,
    stage: Stage,
    recipe: TokenizerRecipe,
    *,
    shards: Sequence[int],
    threads: int = 0,
    on_progress: Progress | None = None,
) -> TokenizerInfo:
    """Trains one learned tokenizer, or finds it done.

    Args:
        store: The dataset.
        name: Modality.
        stage: The stage that wrote its values.
        recipe: Network, loss and budget.
        shards: As in `train_tokenizers`.
        threads: CPU threads; 0 leaves torch's choice.
        on_progress: Called with (modality, step, steps).
    """
    from tokenizers_vq.tokenizer import Tokenizer

    path = tokenizer_path(name, recipe, [stage], shards)
    if store.exists(f"{path}/{INFO}"):
        return read_info(store, path)
    began = time.monotonic()
    train, held_out = load_crops(store, name, stage, recipe, shards, held_out=_HELD_OUT)
    task = reconstruction_task(store, name, recipe, train)
    side = recipe.size if recipe.picture else 0
    check = task.measure = HealthCheck(name, task.codec, held_out, side=side)
    if recipe.perceptual:
        check.perceptual = task.perceptual
    run = f"runs/{path}"
    trainer = Trainer(store, run, task, recipe.training(threads))

    def report(step: int, steps: int, _: dict[str, float]) -> None:
        if on_progress:
            on_progress(name, step, steps)

    result = trainer.fit(report)
    check.publish(store, path, run, result.steps)
    tokenizer = Tokenizer(name, result.model, task.codec)
    info = _publish(store, path, tokenizer, check.metrics, time.monotonic() - began)
    trainer.checkpoints.clear()
    logger.info("%s: %s", path, check.metrics)
    return info


def _publish(
    store: Store, path: str, tokenizer: Tokenizer, metrics: dict[str, float], seconds: float
) -> TokenizerInfo:
    from tokenizers_vq.tokenizer import fingerprint

    files = tokenizer.files()
    for file, data in files.items():
        if not store.create(f"{path}/{file}", data):
            files[file] = store.read(f"{path}/{file}")  # another worker was first: theirs counts
    info = TokenizerInfo(
        modality=tokenizer.modality,
        path=path,
        fingerprint=fingerprint(files),
        vocab_size=tokenizer.vocab_size,
        num_tokens=tokenizer.num_tokens,
        metrics=metrics,
        seconds=round(seconds, 2),
        patch=tokenizer.scaling_patch,
        ordered=tokenizer.ordered,
    )
    store.create_json(f"{path}/{INFO}", asdict(info))
    return read_info(store, path)


def train_text(
    store: Store, stages: Mapping[str, Stage], recipe: TextRecipe, *, shards: Sequence[int]
) -> TokenizerInfo:
    """Trains WordPiece on the captions, with the class names that occur in the boxes."""
    from tokenizers_vq.text import FILE, train_text_tokenizer
    from tokenizers_vq.tokenizer import fingerprint

    path = text_path(stages, recipe, shards)
    if store.exists(f"{path}/{INFO}"):
        return read_info(store, path)
    began = time.monotonic()
    ledger = Ledger(store)
    names = set(recipe.class_names)
    for value in _all_values(ledger, stages, "det", shards):
        names.update(instance["class_name"] for instance in value["instances"])
    tokenizer = train_text_tokenizer(
        _all_values(ledger, stages, "caption", shards),
        class_names=names,
        bins=recipe.bins,
        vocab_size=recipe.vocab_size,
        words=recipe.words,
    )
    data = tokenizer.to_bytes()
    store.create(f"{path}/{FILE}", data)
    info = TokenizerInfo(
        modality=TEXT,
        path=path,
        fingerprint=fingerprint({FILE: data}),
        vocab_size=tokenizer.vocab_size,
        num_tokens=0,
        metrics={"bins": tokenizer.bins, "classes": len(tokenizer.class_names)},
        seconds=round(time.monotonic() - began, 2),
    )
    store.create_json(f"{path}/{INFO}", asdict(info))
    return read_info(store, path)


def _all_values(
    ledger: Ledger, stages: Mapping[str, Stage], name: str, shards: Sequence[int]
) -> Iterator[Any]:
    if name in stages:
        for shard in shards:
            for _, value in read_values(ledger, stages[name], shard, name):
                if value is not None:
                    yield value
