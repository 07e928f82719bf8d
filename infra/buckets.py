"""Full batches out of a stream of unlike items: alike ones meet, and all come out in their order.

    buckets = Buckets(network, size=32, most=2**24)
    for picture in pictures:
        buckets.add(picture, kind=picture.shape, cost=picture.size)
        yield from buckets.finished()
    yield from buckets.finished(last=True)

Pictures of many shapes, read in batches of 32, hold few of each shape; here each waits for its
like, while no more than `most` is held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Entry(Generic[T]):
    item: T
    kind: Hashable
    cost: int
    done: bool


class Buckets(Generic[T]):
    """Gathers items of a kind into batches and runs each batch as soon as it is full.

    When more is held than may be, the kind of the oldest item goes as it is: so an item waits for
    its like for as long only as others may be held back by it, and the batches are a function of
    the stream alone.

    Args:
        run: Works on a batch of one kind; what it makes is kept in the items.
        size: Items of a full batch.
        most: Cost of the items held, those that are done and wait for an older one included. Two
            batches are always held if the stream has them.
    """

    def __init__(self, run: Callable[[list[T]], Any], *, size: int, most: int) -> None:
        self._run, self._size, self._most = run, size, most
        self._held: deque[_Entry[T]] = deque()
        self._cost = 0
        self._open: dict[Hashable, list[_Entry[T]]] = {}
        self._finished: list[T] = []

    def add(self, item: T, *, kind: Hashable, cost: int = 0) -> None:
        """Take the next item of the stream, and run what is due by it."""
        entry = _Entry(item, kind, cost, done=False)
        self._held.append(entry)
        self._cost += cost
        waiting = self._open.setdefault(kind, [])
        waiting.append(entry)
        if len(waiting) == self._size:
            self._close(kind)
        while self._cost > self._most and len(self._held) > 2 * self._size:
            self._close(self._held[0].kind)

    def skip(self, item: T) -> None:
        """Take the next item of the stream, on which there is nothing to work."""
        self._held.append(_Entry(item, None, 0, done=True))
        self._release()

    def finished(self, *, last: bool = False) -> list[T]:
        """Items that are done, in the order they came in, each once.

        Args:
            last: The stream has ended: what waits is run as it is.
        """
        while last and self._open:
            self._close(next(iter(self._open)))
        found, self._finished = self._finished, []
        return found

    def _close(self, kind: Hashable) -> None:
        entries = self._open.pop(kind)
        self._run([entry.item for entry in entries])
        for entry in entries:
            entry.done = True
        self._release()

    def _release(self) -> None:
        while self._held and self._held[0].done:
            entry = self._held.popleft()
            self._cost -= entry.cost
            self._finished.append(entry.item)
