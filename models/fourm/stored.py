"""Tokens of the samples of a batch where they are stored, of which only those chosen are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from models.fourm.spans import ranges


class Stored:
    """Token ids [B, length] that lie in memory-mapped shards.

    Read like an array: `stored[rows, positions]` fetches single tokens, anything else all of them.
    """

    dtype = np.dtype(np.int64)

    def __init__(
        self, values: Sequence[np.ndarray], part: np.ndarray, begin: np.ndarray, length: int
    ) -> None:
        """Row i begins at `begin[i]` of `values[part[i]]`; both are int64 [B]."""
        self._values, self._part, self._begin = list(values), part, begin
        self.shape = len(begin), length

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        size, length = self.shape
        rows, places = np.repeat(np.arange(size), length), np.tile(np.arange(length), size)
        return self.tokens(rows, places).reshape(self.shape).astype(dtype or self.dtype)

    def __getitem__(self, key: Any) -> np.ndarray:
        if isinstance(key, tuple) and all(isinstance(one, np.ndarray) for one in key):
            return self.tokens(*key)
        return np.asarray(self)[key]

    def heads(self, count: np.ndarray) -> np.ndarray:
        """The first `count` [B] tokens of every row, behind one another, int64."""
        return self.tokens(np.repeat(np.arange(len(self)), count), ranges(0 * count, count))

    def tokens(self, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Tokens [n] at `places` [n] of `rows` [n], int64."""
        index = self._begin[rows] + places
        if len(self._values) == 1:
            return self._values[0][index].astype(self.dtype)
        owner = self._part[rows]
        order = owner.argsort(kind="stable")
        bounds = np.searchsorted(owner[order], np.arange(len(self._values) + 1)).tolist()
        out = np.empty(len(index), self.dtype)
        for values, first, last in zip(self._values, bounds, bounds[1:], strict=False):
            out[order[first:last]] = values[index[order[first:last]]]
        return out
