"""How fast 4M trains, and how fast one core feeds it."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from infra.machine import peak_rss
from infra.store import Store
from models.fourm.draws import Draws
from models.fourm.loader import TokenDataset
from models.fourm.masking import mask_batch
from tasks.recipes import recipe
from tasks.train import FourMTask
from tasks.trainer import Trainer
from tests.benchmarks.data import empty_store, token_set
from tests.benchmarks.measure import Options, Record, rates

BATCH, WINDOW, WINDOWS = 64, 2, 4


def _task(store: Store, options: Options) -> FourMTask:
    chosen = recipe("demo", steps=WINDOW * WINDOWS, batch_size=BATCH)
    training = replace(chosen.training, precision=options.dtype, threads=options.threads,
                       log_every=WINDOW)
    return FourMTask(store, token_set(store), replace(chosen, training=training, val_samples=1))


def _shape(task: FourMTask) -> dict[str, Any]:
    return {"recipe": "demo", "batch": BATCH, "dim": task.config.dim,
            "encoder": task.config.encoder_depth, "decoder": task.config.decoder_depth,
            "modalities": len(task.config.modalities)}


def train_step(options: Options) -> list[Record]:
    """Steps of the demo's training through the trainer: masking, forward, backward, optimiser.

    The first window pays for set-up and is left out; peak memory is that of the process.
    """
    with empty_store() as store:
        task = _task(store, options)
        points: list[dict[str, float]] = []
        Trainer(store, "runs/bench", task, task.recipe.training).fit(
            lambda step, steps, metrics: points.append(metrics)
        )
        batches = [task.batch(step, 0, 1) for step in range(WINDOW, WINDOW * WINDOWS)]
    slots = statistics.mean(b.enc_mod.shape[1] + b.dec_mod.shape[1] for b in batches)
    speed, mfu = (statistics.median(point[name] for point in points[1:])
                  for name in ("samples_per_second", "mfu"))
    also = {"tokens_per_second": round(speed * slots, 1), "tokens_per_sample": round(slots, 1),
            "mfu": round(mfu, 3), "peak_mb": round(peak_rss() / 1e6, 1)}
    return [Record(name="train_step", unit="samples/s", ours=round(speed, 2), shape=_shape(task),
                   dtype=options.dtype, threads=options.threads, also=also)]


def loader(options: Options) -> list[Record]:
    """Masked batches from token blocks and stored pictures on one core.

    Every picture is decoded anew, as in a set larger than memory; `warm` keeps decoded pictures,
    and `masking` is what masking alone would reach.
    """
    with empty_store() as store:
        task = _task(store, options)
        specs = task.config.modalities
        cold = TokenDataset(store, task.manifest, "train", specs, cache_bytes=0)
        warm = TokenDataset(store, task.manifest, "train", specs, crops=1)
        ready = warm.batch_at(0, BATCH)
        steps = len(warm) // BATCH
        for step in range(steps):
            warm.batch_at(step, BATCH)

        def epoch(data: TokenDataset | None) -> None:
            for step in range(steps):
                samples = ready if data is None else data.batch_at(step, BATCH)
                mask_batch(task.config, samples, task.mixture, Draws(0, step, BATCH))

        calls = [lambda: epoch(cold), lambda: epoch(warm), lambda: epoch(None)]
        found, cached, masking = rates(calls, steps * BATCH, options.seconds)
    also = {"batches_per_second": round(found / BATCH, 2), "warm": cached, "masking": masking}
    return [Record(name="loader", unit="samples/s/core", ours=found, shape=_shape(task),
                   dtype="uint16", threads=1, also=also)]
