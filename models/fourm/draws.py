"""Random numbers of masking, the same for any number of workers. B samples, m modalities."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

STREAMS = 3
"""Number of the streams below: another one masks the same step of the same seed otherwise, so a
training that has begun with one cannot go on with another."""
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31


class Draws:
    """Random numbers as a pure function of (seed, step, tag), the same for any number of workers.

    Numbers of which a batch needs many are hashes of their place (the generator SplitMix64, which
    reaches any place at once), so that those of any rows cost no more than these rows. The few
    that follow other distributions are drawn for the whole batch and cut to this worker's rows.
    """

    def __init__(self, seed: int, step: int, batch_size: int, rows: slice = slice(None)) -> None:
        self._key, self._size, self.rows = (seed, step), batch_size, rows
        self._starts: dict[str, tuple[np.ndarray, np.uint64]] = {}
        self._places = np.arange(batch_size, dtype=np.uint64)[rows]

    def generator(self, tag: str) -> np.random.Generator:
        """The generator of one purpose."""
        return np.random.default_rng([*self._key, zlib.crc32(tag.encode())])

    def hashes(
        self, tag: str, count: int, chosen: np.ndarray | None = None,
        part: np.ndarray | None = None,
    ) -> np.ndarray:
        """Random uint64 [n, count] for row numbers `chosen` [n] (default: all rows), another set
        of them for each number in `part` [n]."""
        if tag not in self._starts:
            seeds = np.random.SeedSequence([*self._key, zlib.crc32(tag.encode())])
            first, second = seeds.generate_state(2, np.uint64)
            self._starts[tag] = _mixed(self._places * _GOLDEN + first), second
        start, second = self._starts[tag]
        if chosen is not None:
            start = start[chosen]
        if part is not None:
            start = _mixed(start + part.astype(np.uint64) * _GOLDEN + second)
        return _mixed(start[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)

    def words(
        self, tag: str, count: int, chosen: np.ndarray | None = None,
        part: np.ndarray | None = None,
    ) -> np.ndarray:
        """Random uint32 [n, count], see `hashes`."""
        return self.hashes(tag, -(-count // 2), chosen, part).view(np.uint32)[:, :count]

    def uniform(self, tag: str, *shape: int) -> np.ndarray:
        """Uniforms [B, *shape] in 0..1."""
        drawn = self.hashes(tag, int(np.prod(shape)))
        return ((drawn >> 11) * 2.0**-53).reshape(len(drawn), *shape)

    def some(self, tag: str, count: int, chosen: np.ndarray, part: np.ndarray) -> np.ndarray:
        """Uniforms [n, count], float32, of row numbers [n] at attempts `part` [n]."""
        drawn = (self.words(tag, count, chosen, part) >> 8).astype(np.float32)
        drawn *= np.float32(2.0**-24)
        return drawn

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

    def picks(self, tag: str, alpha: np.ndarray) -> np.ndarray:
        """The modalities [B, m] with the largest share in m Dirichlet draws each: where all
        concentrations [whole batch, m] that are not 0 are equal, any with the same chance."""
        usable = alpha > 0
        count = usable.sum(1)
        even = (np.where(usable, alpha, np.inf).min(1) >= alpha.max(1))[self.rows, None]
        number = (self.uniform(tag, alpha.shape[1]) * count[self.rows, None]).astype(np.intp)
        chosen = np.take_along_axis(np.argsort(~usable, axis=1, kind="stable")[self.rows],
                                    number, 1)
        if even.all():
            return chosen
        drawn = self.dirichlet(tag, alpha, alpha.shape[1]).argmax(-1)
        return np.where(even, chosen, drawn)


def _mixed(state: np.ndarray) -> np.ndarray:
    """SplitMix64's output for every state, in place."""
    moved = np.empty_like(state)
    for shift, factor in _ROUNDS:
        state ^= np.right_shift(state, shift, out=moved)
        state *= factor
    state ^= np.right_shift(state, _LAST_SHIFT, out=moved)
    return state
