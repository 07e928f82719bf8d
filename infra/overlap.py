"""Overlap inside a worker: decode, network and encode run at the same time in threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def prefetch(
    source: Iterable[T], depth: int = 2, *, wait: bool = False
) -> Generator[T, None, None]:
    """Run an iterable in a background thread, at most `depth` items ahead.

    An exception of the source is raised here in its place. Closing the iterator, or letting go
    of it, ends the thread after the item it is making; with `wait` closing returns after that, for
    a process that ends while the thread is inside native code is aborted.
    """
    items: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: tuple[bool, Any]) -> None:
        while not stop.is_set():
            try:
                return items.put(item, timeout=0.1)
            except queue.Full:
                continue

    def fill() -> None:
        end: tuple[bool, Any] = (True, None)
        try:
            for item in source:
                put((False, item))
                if stop.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - raised by the consumer
            end = (True, error)
        put(end)

    thread = threading.Thread(target=fill, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            ended, item = items.get()
            if not ended:
                yield item
            elif item is not None:
                raise item
            else:
                return
    finally:
        stop.set()
        if wait:
            thread.join()


def pipelined(source: Iterable[Any], *stages: Callable[[Any], Any], depth: int = 2) -> Iterator:
    """Apply stages to each item in order, every stage in a thread of its own.

        pipelined(batches, decode, network, encode)   # the network never waits for decoding

    The order of items is kept. At most `depth` items wait between two stages.
    """
    stream: Iterator[Any] = prefetch(source, depth)
    for stage in stages:
        stream = prefetch(map(stage, stream), depth)
    return stream
