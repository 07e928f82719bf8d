"""Overlap inside a worker: decode, network and encode run at the same time in threads."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

GIVE_WAY = 5
"""Added to the niceness of threads beside a network. As its equals they take its core again and
again although another is idle: 5 % of the time of a network at 200 images/s."""


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


def trailing(
    call: Callable[[T], R], source: Iterable[T], depth: int = 2
) -> Generator[R, None, None]:
    """Apply a call to items in a background thread, while this one makes the next items.

    Results come in order, an exception of the call in the place of its result; at most `depth`
    items wait.
    """
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="trailing") as pool:
        for item in source:
            waiting.append(pool.submit(call, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def pipelined(
    source: Iterable[Any],
    before: Callable[[Any], Any],
    work: Callable[[Any], Any],
    after: Callable[[Any], Any],
    depth: int = 2,
) -> Generator[Any, None, None]:
    """Apply three stages to each item in order, all three at the same time.

        pipelined(batches, decode, network, encode)   # the network never waits for decoding

    `work` runs in the calling thread, the others in threads of their own: what a network
    allocates is then reused by the next unit, where the memory of a thread that ends is given
    back, to be cleared page by page when the next one asks for it. The others give way to it, and
    torch has a single thread in them, so that they take a core each at most.
    """
    before, after = _aside(before), _aside(after)
    return trailing(after, map(work, prefetch(map(before, source), depth)), depth)


def _aside(call: Callable[[T], R]) -> Callable[[T], R]:
    """A call for a thread beside this one. It gives way where both want a core, and in it torch has
    a single thread."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch is not None else 0
    niceness = os.getpriority(os.PRIO_PROCESS, 0) + GIVE_WAY

    def run(item: T) -> R:
        if sys.platform == "linux":  # elsewhere niceness is that of the whole process
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
        if torch is None:
            return call(item)
        torch.set_num_threads(1)  # of this thread, and of those that begin meanwhile
        try:
            return call(item)
        finally:
            torch.set_num_threads(threads)

    return run
