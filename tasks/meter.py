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


class Meter:
    """Means of metrics since the last reading, kept on the device: adding does not sync.

    Rates are those of all `world` workers, taken to be as busy as this one; `peak` tells what one
    of them can do, in FLOP/s (0 = not known, then no utilisation is stated).
    """

    def __init__(self, world: int, peak: Callable[[], float]) -> None:
        self._world, self._peak = world, peak
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Any] = {}
        self._counts: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._samples, self._flops, self._began = 0, 0.0, time.monotonic()

    def add(
        self, metrics: dict[str, torch.Tensor], samples: int, loads: Sequence[Load] = ()
    ) -> None:
        """Takes up one step: its metrics, its samples over all workers, this worker's loads."""
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
        means = {name: float(value) / self._counts[name] for name, value in self._sums.items()}
        seconds = max(time.monotonic() - self._began, 1e-9)
        means["samples_per_second"] = self._samples / seconds
        if self._tokens:
            rates = {name: count * self._world / seconds for name, count in self._tokens.items()}
            means["tokens_per_second"] = sum(rates.values())
            means |= {f"tokens_per_second/{name}": rate for name, rate in rates.items()}
        if self._flops and (peak := self._peak()):
            means["mfu"] = self._flops / seconds / peak
        self._reset()
        return means
