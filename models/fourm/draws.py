"""Random numbers of masking, the same for any number of workers. B samples, m modalities."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

_SPARSE = 3
"""Rows are drawn one by one where this times as many are not asked for."""


class Draws:
    """Random numbers as a pure function of (seed, step, tag), the same for any number of workers:
    they are drawn for the whole batch and cut to this worker's rows."""

    def __init__(self, seed: int, step: int, batch_size: int, rows: slice = slice(None)) -> None:
        self._key, self._size, self.rows = (seed, step), batch_size, rows

    def generator(self, tag: str) -> np.random.Generator:
        """The generator of one purpose."""
        return np.random.default_rng([*self._key, zlib.crc32(tag.encode())])

    def uniform(self, tag: str, *shape: int) -> np.ndarray:
        """Uniforms [B, *shape] in 0..1."""
        return self.generator(tag).random((self._size, *shape))[self.rows]

    def some(self, tag: str, chosen: np.ndarray, *shape: int) -> np.ndarray:
        """`uniform(tag, *shape)[chosen]` for row numbers [n], without drawing what lies between
        few rows of many."""
        if len(chosen) * _SPARSE > self._size:
            return self.uniform(tag, *shape)[chosen]
        places, size = np.arange(self._size)[self.rows][chosen], int(np.prod(shape))
        generator = self.generator(tag)
        found, position = np.empty((len(chosen), *shape)), 0
        for row, place in enumerate(places.tolist()):
            # A number takes one step of the bit generator.
            generator.bit_generator.advance(place * size - position)  # type: ignore[attr-defined]
            found[row] = generator.random(shape)
            position = (place + 1) * size
        return found

    def components(self, weights: Sequence[float], per_batch: bool) -> np.ndarray:
        """Index of the component of every sample of the whole batch, drawn by `weights`; one for
        all samples if `per_batch`."""
        edges = np.cumsum(weights)
        size = 1 if per_batch else self._size
        drawn = self.generator("component").random(size) * edges[-1]
        return np.broadcast_to(np.searchsorted(edges, drawn, side="right"), self._size)

    def integers(self, tag: str, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Integers [B] in low..high, both [whole batch] and included."""
        return self.generator(tag).integers(low, high + 1)[self.rows]

    def dirichlet(self, tag: str, alpha: np.ndarray, *extra: int) -> np.ndarray:
        """Shares [B, *extra, m] for concentrations [whole batch, m], 0 where alpha is 0.

        Works on logarithms, so concentrations of 0.001 do not underflow to all zeros:
        Gamma(a) = Gamma(a + 1) * U^(1/a).
        """
        generator = self.generator(tag)
        alpha = alpha.reshape(len(alpha), *[1] * len(extra), alpha.shape[1])
        shape = (self._size, *extra, alpha.shape[-1])
        safe = np.where(alpha > 0, alpha, 1.0)
        log = np.log(generator.standard_gamma(safe + 1, shape))
        log += np.log1p(-generator.random(shape)) / safe
        log = np.where(alpha > 0, log, -np.inf)[self.rows]
        share = np.exp(log - log.max(-1, keepdims=True))
        return share / share.sum(-1, keepdims=True)
