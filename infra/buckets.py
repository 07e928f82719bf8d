"""Full batches out of a stream of unlike items: alike ones wait for each other, in bounded memory.

    buckets = Buckets[Picture](size=32, most=2**25)
    for picture in pictures:
        for batch in buckets.add(picture, kind=picture.shape[:2], cost=picture.size):
            network(batch)
    for batch in buckets.rest():
        network(batch)
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Buckets(Generic[T]):
    """Gathers items of a kind into batches, which are a function of the stream alone.

    Args:
        size: Items of a full batch.
        most: Cost of all items that may wait. Beyond it the fullest bucket goes as it is, but
            one batch's worth of items may wait whatever it costs.
    """

    def __init__(self, *, size: int, most: int) -> None:
        self._size, self._most = size, most
        self._open: dict[Hashable, list[tuple[T, int]]] = {}
        self._count = self._cost = 0

    def add(self, item: T, *, kind: Hashable, cost: int = 0) -> list[list[T]]:
        """Take the next item of the stream.

        Returns:
            Batches that are due by it, each of one kind and in the order of the stream.
        """
        bucket = self._open.setdefault(kind, [])
        bucket.append((item, cost))
        self._count += 1
        self._cost += cost
        due = [self._close(kind)] if len(bucket) == self._size else []
        while self._cost > self._most and self._count > self._size:
            due.append(self._close(max(self._open, key=lambda each: len(self._open[each]))))
        return due

    def rest(self) -> list[list[T]]:
        """Batches of what waits still, when the stream has ended."""
        return [self._close(kind) for kind in list(self._open)]

    def _close(self, kind: Hashable) -> list[T]:
        entries = self._open.pop(kind)
        self._count -= len(entries)
        self._cost -= sum(cost for _, cost in entries)
        return [item for item, _ in entries]
