"""Columns of a token shard as one array, so that one indexing reads tokens of many rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa


class Flat:
    """Tokens of several columns in one array, and where the rows of each begin in it."""

    def __init__(
        self, values: np.ndarray, starts: np.ndarray, firsts: np.ndarray,
        rows: int | tuple[np.ndarray, np.ndarray],
    ) -> None:
        """`starts` [columns * blocks] of each column of each block, whose first rows are `firsts`
        [blocks]; `rows` is the length of all rows, or an array of Arrow's offsets and where those
        of each column of each block begin."""
        self.values, self._firsts, self._rows = values, firsts, rows
        self._starts = starts

    def find(self, column: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where rows [n] of columns [n], by number, begin in `values`, and their lengths [n]."""
        block = np.searchsorted(self._firsts, row, side="right") - 1
        inside, place = row - self._firsts[block], column * len(self._firsts) + block
        if isinstance(self._rows, int):
            return self._starts[place] + inside * self._rows, np.full(len(row), self._rows)
        offsets, starts = self._rows
        at = starts[place] + inside
        begin = offsets[at].astype(np.int64)
        return self._starts[place] + begin, offsets[at + 1] - begin


def joined(views: Sequence[np.ndarray], buffer: pa.Buffer) -> tuple[np.ndarray, np.ndarray]:
    """All views of one dtype as one array, and where in it each begins: `buffer` itself where they
    lie in it, a copy where blocks are compressed."""
    dtype = views[0].dtype
    whole = np.frombuffer(buffer, dtype, count=buffer.size // dtype.itemsize)
    starts = np.array([view.ctypes.data - buffer.address if view.size else 0 for view in views])
    ends = starts + [view.nbytes for view in views]
    if ((starts >= 0) & (ends <= whole.nbytes) & (starts % dtype.itemsize == 0)).all():
        return whole, starts // dtype.itemsize
    sizes = np.array([view.size for view in views])
    return np.concatenate(views), np.cumsum(sizes) - sizes
