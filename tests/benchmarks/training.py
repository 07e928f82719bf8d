"""How fast 4M trains: steps of the one trainer, beside those of the released training script."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infra.machine import peak_rss
from infra.store import Store
from models.fourm.batch import Batch
from models.fourm.model import FourM
from models.fourm.spec import FourMConfig
from tasks.flops import Load, fourm_load, peak_flops
from tasks.meter import TRAINING_PASSES
from tasks.task import Task
from tasks.train_config import TrainConfig
from tasks.trainer import Trainer
from tests.benchmarks.measure import MIN_ROUNDS, Options, Record, cases
from tests.benchmarks.peer import Peer
from tests.benchmarks.seven import PEER_MODELS, SIZES, hand_over, random_batches, seven

BATCH, BATCHES, SLOTS, MANY = 16, 2, 256, 10_000
RATE, CLIP = 1e-4, 1.0
PRODUCTS = {"fp32": "of fp32", "tf32": "of fp32, inputs rounded to bf16 by the CPU, sums in fp32",
            "bf16": "of bf16, under autocast"}
"""What a record's dtype says of matrix products on a CPU; all else is in fp32."""


class _Steps(Task):
    """4M-7 on batches that are ready; `folder` receives weights and batches for others."""

    def __init__(self, config: FourMConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.batches = random_batches(config, BATCH, BATCHES)

    def build_model(self) -> nn.Module:
        model = FourM(self.config)
        hand_over(self.folder, model, self.batches)
        return model

    def batch(self, step: int, rank: int, world: int) -> Batch:
        return self.batches[step % BATCHES]

    def loss(
        self, model: nn.Module, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        losses = model(batch)
        return losses.total, {name: loss.detach() for name, loss in losses.per_modality.items()}

    def load(self, batch: Batch) -> Load:
        return fourm_load(self.config, batch)


class _Enough(Exception):
    """Enough steps were measured."""


class _Turns:
    """Takes the time of each step; between two of them all others have one turn."""

    def __init__(self, seconds: float, others: Callable[[], Sequence[Callable[[], float]]]) -> None:
        self._seconds, self._make = seconds, others
        self._others: Sequence[Callable[[], float]] = ()
        self.taken: list[list[float]] = []
        self.losses: list[float] = []
        self._began = self._last = 0.0

    def __call__(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        own = time.perf_counter() - self._last
        if not self.losses:
            self._others = self._make()
        self.losses.append(metrics["loss"])
        turn = [own, *(other() for other in self._others)]
        if len(self.losses) > BATCHES:
            self.taken.append(turn)
        else:  # the first steps pay for set-up
            self._began = time.perf_counter()
        enough = time.perf_counter() - self._began >= self._seconds
        if len(self.taken) >= MIN_ROUNDS and enough:
            raise _Enough
        self._last = time.perf_counter()


def train_step(options: Options) -> list[Record]:
    """Steps of 4M-7 with 128 inputs and 128 targets: forward, backward, clipping, AdamW.

    The released code runs its training script's loop on the same batches from the same weights: in
    fp32, as it runs on a CPU whatever precision it is told, and for bf16 under autocast besides.
    tf32 is ours alone, beside that fp32.
    """
    return cases({f"train_step.{size}": partial(_train_step, options, size)
                  for size in options.sizes if size in SIZES}, options.only)


def _train_step(options: Options, size: str) -> Record:
    config = seven(size)
    with tempfile.TemporaryDirectory(prefix="fourm-bench-") as folder, ExitStack() as stack:
        at = Path(folder)
        task = _Steps(config, at / "hand-over")
        peer = stack.enter_context(Peer(options.peer, options.threads)) if options.peer else None

        def others() -> list[Callable[[], float]]:
            if peer is None:
                return []
            step = peer.prepare("train", at=str(task.folder), model=PEER_MODELS[size], lr=RATE,
                                clip=CLIP)
            kinds = (False, True) if options.dtype == "bf16" else (False,)
            return [partial(step, autocast=kind) for kind in kinds]

        turns = _Turns(options.seconds, others)
        training = TrainConfig(
            steps=MANY, batch_size=BATCH, lr=RATE, warmup_steps=0, clip_norm=CLIP, log_every=1,
            precision=options.dtype, threads=options.threads, compile=options.compile,
            checkpoint_seconds=1e9,
        )
        try:
            Trainer(Store(folder), "runs/bench", task, training).fit(turns)
        except _Enough:
            pass
        seconds = [statistics.median(side) for side in zip(*turns.taken, strict=True)]
        speeds = [BATCH / second for second in seconds]
        also = _figures(task, options, seconds[0]) | {"first_loss": round(turns.losses[0], 5),
                                                      "steps": len(turns.losses)}
        if peer:
            also |= {"peer_peak_mb": round(peer.peak / 1e6)}
        if len(speeds) > 2:
            also |= {"peer_autocast": round(speeds[2], 3),
                     "ratio_autocast": round(speeds[0] / speeds[2], 3)}
    shape = {"model": f"4M-7 {size}", "batch": BATCH, "inputs": 128, "targets": 128,
             "modalities": len(config.targets), "compiled": options.compile,
             "products": PRODUCTS[options.dtype]}
    return Record(name=f"train_step.{size}", unit="samples/s", ours=round(speeds[0], 3),
                  peer=round(speeds[1], 3) if peer else None, shape=shape, dtype=options.dtype,
                  threads=options.threads, also=also)


def _figures(task: _Steps, options: Options, seconds: float) -> dict[str, Any]:
    """Tokens/s, utilisation and memory of steps that take so many seconds."""
    flops = TRAINING_PASSES * statistics.mean(task.load(batch).flops for batch in task.batches)
    peak = peak_flops(torch.device("cpu"), options.dtype)
    return {"tokens_per_second": round(BATCH * SLOTS / seconds, 1),
            "tflop_per_step": round(flops / 1e12, 3), "mfu": round(flops / seconds / peak, 3),
            "matmul_tflops": round(peak / 1e12, 3), "peak_mb": round(peak_rss() / 1e6)}
