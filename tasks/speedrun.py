"""The speedrun: how long until 4M has learned a fixed set of scenes to a fixed loss.

The score is the validation loss from pixels to every other modality as a share of what the best
constant guess costs, averaged over modalities; the run ends when it is at most `TARGET`. What
counts is the time of training steps, without evaluations and without making the set. Anything but
the set and the score may be changed; the leaderboard keeps what became faster, with its commit.

    runs/<run>/clock.json     seconds of training at points of the curve, for runs that were cut off
    runs/<run>/speedrun.json  the outcome, written last
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from infra import machine
from infra.manifest import Manifest
from infra.store import Store
from models.fourm.cost import expected_load, train_flops
from tasks.recipes import TrainRecipe, described
from tasks.run_store import Checkpoints
from tasks.speedrun_set import make_set, set_digest
from tasks.train import FourMTask
from tasks.trainer import ProgressCallback, Trainer

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger("fourm.speedrun")

SCENES = 4608
"""Scenes of the set, a ninth of them held out."""
TARGET = 0.32
"""Share of a constant guess's loss at which the run ends: a little below what a run of 300 steps
comes to (0.333)."""
SCORE = "val/share"


@dataclass(frozen=True)
class Outcome:
    """What a speedrun came to."""

    reached: bool
    score: float
    target: float
    steps: int
    seconds: float
    """Of training steps, evaluations left out."""
    tokens: float
    """Input and target slots."""
    flops: float
    set: str
    """Digest of the token set."""
    recipe: str
    """Digest of the recipe."""

    def __str__(self) -> str:
        verdict = "reached" if self.reached else "missed"
        return (f"{verdict} {self.target:g} with {self.score:.4f} after {self.steps} steps: "
                f"{self.seconds:.1f} s, {self.tokens / 1e6:.2f} M tokens, "
                f"{self.flops / 1e12:.2f} TFLOP, {self.flops / self.seconds / 1e9:.0f} GFLOP/s")


class _ReachedError(Exception):
    """Ends a training whose validation loss is low enough."""


class SpeedrunTask(FourMTask):
    """4M training that ends itself at a score."""

    def __init__(
        self, store: Store, manifest: Manifest, recipe: TrainRecipe, target: float
    ) -> None:
        super().__init__(store, manifest, recipe)
        self.target, self.score, self.evaluating = target, float("inf"), 0.0

    @cached_property
    def constant(self) -> dict[str, float]:
        """Loss of the best constant guess of each validation loss, in nats."""
        counts: dict[str, np.ndarray] = {}
        largest = max(spec.vocab_size for spec in self.config.targets)
        for name, batch in self.validation:
            found = np.bincount(batch.targets.numpy(), minlength=largest)
            counts[name] = counts.get(name, 0) + found
        return {name: _entropy(count) for name, count in counts.items()}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The losses and the score. Raises _ReachedError at the target."""
        began = time.monotonic()
        losses = super().evaluate(model)
        shares = [loss / self.constant[name] for name, loss in losses.items()]
        self.score = float(np.mean(shares))
        self.evaluating += time.monotonic() - began
        if self.score <= self.target:
            raise _ReachedError
        return {**losses, SCORE: self.score}


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return max(float(-(share * np.log(share)).sum()), 1e-9)


class _Clock:
    """Seconds of training, over all parts of a run that was cut off."""

    def __init__(self, store: Store, path: str, task: SpeedrunTask) -> None:
        self._store, self._name, self._task = store, f"{path}/clock.json", task
        self._points: dict[str, float] = {}
        self.step = max(Checkpoints(store, path).steps(), default=0)
        if store.exists(self._name):
            known = store.read_json(self._name)
            self._points = {step: s for step, s in known.items() if int(step) <= self.step}
        self._before = max(self._points.values(), default=0.0)
        self._began = time.monotonic()

    def add(self, step: int) -> None:
        """Notes that `step` is done."""
        self.step = step
        self._points[str(step)] = self.seconds
        self._store.write_json(self._name, self._points)

    @property
    def seconds(self) -> float:
        """So far."""
        return self._before + time.monotonic() - self._began - self._task.evaluating


def speedrun(
    store: Store, recipe: TrainRecipe, *, scenes: int = SCENES, target: float = TARGET,
    on_progress: ProgressCallback | None = None,
) -> Outcome:
    """Trains to the target, or to the recipe's last step; a run that was cut off goes on, one
    that is finished is returned.

    Args:
        store: Where the set and the run are kept.
        recipe: What to train; it must measure the loss where it logs it.
        scenes: Scenes of the set.
        target: Score to reach.
        on_progress: Called with (step, steps, metrics).
    """
    training = recipe.training
    if not training.eval_every or training.eval_every != training.log_every:
        raise ValueError("a speedrun needs eval_every equal to log_every, got "
                         f"{training.eval_every} and {training.log_every}")
    manifest = make_set(store, scenes=scenes)
    task = SpeedrunTask(store, manifest, recipe, target)
    content = json.dumps([described(recipe), set_digest(manifest), target], sort_keys=True)
    path = f"runs/speedrun-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    if store.exists(f"{path}/speedrun.json"):
        return Outcome(**store.read_json(f"{path}/speedrun.json"))
    _ = task.data, task.constant
    clock, reached = _Clock(store, path, task), False

    def follow(step: int, steps: int, metrics: dict[str, float]) -> None:
        clock.add(step)
        if on_progress:
            on_progress(step, steps, {**metrics, SCORE: task.score})

    try:
        Trainer(store, path, task, training).fit(follow)
    except _ReachedError:
        reached = True
    outcome = _outcome(task, clock, manifest, reached)
    store.write_json(f"{path}/speedrun.json", asdict(outcome))
    Checkpoints(store, path).clear()
    return outcome


def _outcome(
    task: SpeedrunTask, clock: _Clock, manifest: Manifest, reached: bool
) -> Outcome:
    load = expected_load(task.config, task.mixture)
    samples = clock.step * task.recipe.training.batch_size
    content = json.dumps(described(task.recipe), sort_keys=True)
    return Outcome(
        reached, round(task.score, 5), task.target, clock.step, round(clock.seconds, 2),
        samples * load.tokens, samples * train_flops(task.config, load), set_digest(manifest),
        hashlib.sha256(content.encode()).hexdigest()[:8],
    )


def read_board(path: str | Path) -> list[dict[str, Any]]:
    """Lines of a leaderboard, oldest first; none where there is no file."""
    file = Path(path)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def check_recordable() -> str:
    """The commit that an entry would name. Raises ValueError where files differ from it."""
    commit = machine.commit_hash()
    if commit.endswith("-dirty"):
        raise ValueError(f"the leaderboard names commits, and this checkout has changes "
                         f"({commit}): commit them first")
    return commit


def record(
    path: str | Path, outcome: Outcome, *, note: str = "",
    now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
) -> str:
    """Adds an outcome to a leaderboard if it is the fastest of its set, target and machine.

    Returns:
        What came of it, a sentence.

    Raises:
        ValueError: the checkout has changes that no commit holds.
    """
    commit, facts = check_recordable(), machine.describe()
    here = {name: facts[name] for name in ("cpu", "cores", "torch") if name in facts}
    alike = [line for line in read_board(path)
             if (line["set"], line["target"], line["machine"]["cpu"], line["machine"]["cores"])
             == (outcome.set, outcome.target, here["cpu"], here["cores"])]
    best = min((line["seconds"] for line in alike), default=float("inf"))
    if not outcome.reached:
        return f"not recorded: {outcome.target:g} was not reached"
    if outcome.seconds >= best:
        return f"not recorded: the best here took {best:.1f} s"
    line = {"date": now().date().isoformat(), "commit": commit, "note": note,
            **asdict(outcome), "machine": here}
    with Path(path).open("a") as file:
        file.write(json.dumps(line) + "\n")
    return f"recorded in {path}" + (f": {best - outcome.seconds:.1f} s faster" if alike else "")
