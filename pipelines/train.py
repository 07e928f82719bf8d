"""Flow: train 4M on a published token set."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from prefect import flow

from infra import ui
from infra.manifest import Manifest, versions
from infra.ray_session import Embedded, ray_session
from infra.store import Store
from pipelines.params import TrainParams
from pipelines.stages import stage_task
from tasks.mixture import open_sets
from tasks.recipes import TrainRecipe, described, recipe
from tasks.report import curve_figure, pace_figure
from tasks.run_store import Checkpoints, read_curve
from tasks.train import train_fourm

logger = logging.getLogger("fourm.flows")

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVE_SECONDS = 60.0
"""Seconds between two pictures of the loss curve."""


@stage_task("train")
def train_model(params: TrainParams) -> dict[str, Any]:
    """Train to the last step; a run that was cut off goes on from its newest checkpoint."""
    store = Store(params.root)
    chosen = recipe(
        params.recipe,
        steps=params.steps,
        batch_size=params.batch_size,
        seed=params.seed,
        start=params.start,
        freeze=params.freeze,
        lora=params.lora,
        ema=params.ema,
    )
    how = params.model_dump(include={"parallel", "accumulate", "recompute", "compile", "wandb"})
    chosen = replace(chosen, training=replace(chosen.training, **how))
    _check_workers(params)
    data = open_sets(store, chosen, params.data or params.manifest)
    run = params.run or _run_of(store, next(iter(data.values()))[0][1], chosen)
    curve = LiveCurve(store, run)
    with ray_session(params.ray) if params.train_workers else nullcontext():
        info = train_fourm(
            store,
            data,
            chosen,
            run=run,
            num_workers=params.train_workers,
            on_progress=curve.add,
            # An embedded Ray never grows: it has its GPUs now or not at all.
            on_gpus=bool(params.gpus) and not isinstance(params.ray, Embedded),
        )
    curve.show()
    metrics = [{"metric": name, "value": round(v, 4)} for name, v in info.metrics.items()]
    ui.table(f"{run}-metrics", metrics, f"Run {run} after {info.steps} steps")
    return {"run": run, **asdict(info)}


def _check_workers(params: TrainParams) -> None:
    """Ray would wait for GPUs without end where no node can come along."""
    there = params.ray.gpus if isinstance(params.ray, Embedded) else 0
    if 0 < there < params.train_workers:
        raise ValueError(
            f"{params.train_workers} training workers take a GPU each, and this machine has "
            f"{there}: lower train_workers, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to train on "
            "cores"
        )


def run_name(manifest: Manifest, chosen: TrainRecipe) -> str:
    """A name that other data or another recipe never shares, such as "main-v1-3fa2c1"."""
    digest = hashlib.sha256(json.dumps(described(chosen), sort_keys=True).encode()).hexdigest()
    return f"{manifest.name}-v{manifest.version}-{digest[:6]}"


def _run_of(store: Store, manifest: Manifest, chosen: TrainRecipe) -> str:
    """The name of the run that goes on or begins; says so where one on an earlier version stays."""
    run, name = run_name(manifest, chosen), manifest.name
    for older, version in cut_off(store, manifest, chosen).items():
        logger.warning(
            "%s was cut off, and %s was published anew since: this begins %s; "
            "--manifest %s@%d goes on with the other", older, name, run, name, version,
        )  # fmt: skip
    return run


def cut_off(store: Store, manifest: Manifest, chosen: TrainRecipe) -> dict[str, int]:
    """Runs of this recipe on earlier versions of a manifest that have checkpoints and did not end,
    with the version; none where the one on this version has begun."""
    if Checkpoints(store, f"runs/{run_name(manifest, chosen)}").steps():
        return {}
    earlier = [version for version in versions(store, manifest.name) if version < manifest.version]
    names = {run_name(replace(manifest, version=version), chosen): version for version in earlier}
    return {run: version for run, version in names.items()
            if Checkpoints(store, f"runs/{run}").steps()
            and not store.exists(f"runs/{run}/run.json")}  # fmt: skip


class LiveCurve:
    """Progress, losses and pace of a run in the UI while it trains."""

    def __init__(self, store: Store, run: str) -> None:
        self._run = run
        self._points = read_curve(store, f"runs/{run}")
        self._progress = ui.progress(f"train {run}")
        self._shown = time.monotonic()

    def add(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        """Take up a point of the curve, and show it all now and then."""
        # A run that goes on from a checkpoint comes by some of its points again.
        self._points = [point for point in self._points if point["step"] < step]
        self._points.append({"step": step, **metrics})
        pace = metrics.get("samples_per_second", 0.0)
        text = f"step {step}/{steps}, loss {metrics.get('loss', 0.0):.3f}, {pace:.0f} samples/s"
        self._progress.update(step, steps, text)
        if time.monotonic() - self._shown > CURVE_SECONDS:
            self.show()

    def show(self) -> None:
        """Draw the curves into the UI."""
        self._shown = time.monotonic()
        if len(self._points) > 1 and ui.in_run():
            for name, draw in (("loss", curve_figure), ("pace", pace_figure)):
                picture = _picture(draw(self._points))
                ui.gallery(f"{self._run}-{name}", [("", picture)],
                           f"{name.capitalize()} of run {self._run}")  # fmt: skip


def _picture(figure: Figure) -> np.ndarray:
    """uint8 [H, W, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


@flow(
    name="train",
    flow_run_name="{params.dataset}",
    description=TrainParams.__doc__,
)
def train_flow(params: TrainParams) -> dict[str, Any]:
    """Train 4M on a published token set."""
    return train_model(params)
