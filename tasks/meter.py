"""Means and rates between two points of the loss curve."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tasks.flops import Load

if TYPE_CHECKING:
    import torch

TRAINING_PASSES = 3
"""A training step costs this many forward passes: one, and two for the gradients."""


Everyone = Callable[[Any], list[Any]]
"""Takes this worker's JSON value and returns those of all workers, all of whom call it alike."""


class Meter:
    """Means of metrics since the last reading, kept on the device: adding does not sync.

    What is read is that of all workers together. `peak` tells what one of them can do, in FLOP/s
    (0 = not known, then no utilisation is stated).
    """

    def __init__(
        self, peak: Callable[[], float], everyone: Everyone = lambda own: [own]
    ) -> None:
        self._peak, self._everyone = peak, everyone
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Any] = {}
        self._counts: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._samples, self._flops, self._began = 0, 0.0, time.monotonic()

    def add(
        self, metrics: dict[str, torch.Tensor], samples: int, loads: Sequence[Load] = ()
    ) -> None:
        """Takes up one step: this worker's metrics and loads, and the samples of all workers."""
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] += 1
        for load in loads:
            self._tokens.update(load.tokens)
            self._flops += TRAINING_PASSES * load.flops
        self._samples += samples

    def take(self) -> dict[str, float]:
        """Means since the last call, samples_per_second, and where loads are known
        tokens_per_second (of all and per modality) and mfu, the share of the peak."""
        own = {name: float(value) for name, value in self._sums.items()}
        workers = self._everyone([own, self._counts, self._tokens, self._flops])
        sums, counts, tokens = (_added(part) for part in list(zip(*workers, strict=True))[:3])
        means = {name: value / counts[name] for name, value in sums.items()}
        seconds = max(time.monotonic() - self._began, 1e-9)
        means["samples_per_second"] = self._samples / seconds
        if tokens:
            rates = {name: count / seconds for name, count in tokens.items()}
            means["tokens_per_second"] = sum(rates.values())
            means |= {f"tokens_per_second/{name}": rate for name, rate in rates.items()}
        flops = sum(worker[3] for worker in workers)
        if flops and (peak := self._peak()):
            means["mfu"] = flops / seconds / peak / len(workers)
        self._reset()
        return means


def _added(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sums of numbers by name."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0) + value
    return total
