"""Overlap inside a worker: decode, network and encode run at the same time in threads, and the
units of a worker meet at its `Lane`, so that the network has no pause between them.

`Waits` and `Depths` tell where such work is held up, for the commit of the shard.
"""

from __future__ import annotations

import math
import os
import queue
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

from infra.machine import keep_freed_memory

T = TypeVar("T")
R = TypeVar("R")

INPUT, OUTPUT = "input", "output"
"""What a network waits for: the next batch, and that an earlier one is encoded."""
GIVE_WAY = 5
"""Added to the niceness of threads beside a network. As its equals they take its core again and
again although another is idle: 5 % of the time of a network at 200 images/s."""
UNITS_AT_ONCE = 2
"""Units of a worker that meet at its lane: one has it, of the other the first batches are prepared
or the last ones encoded and committed."""


class Waits:
    """Seconds that a loop waited, by what it waited for."""

    def __init__(self) -> None:
        self.seconds = defaultdict[str, float](float)
        self.turn = 0.0
        """Further seconds, in which another unit had the network: no time of this one's work."""

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Count the seconds of the block."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] += time.monotonic() - began

    def each(self, source: Iterable[T], what: str) -> Generator[T, None, None]:
        """Pass items on, and count the seconds that each takes to come."""
        items = iter(source)
        while True:
            with self.on(what):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def record(self, parts: int = 1) -> dict[str, float]:
        """Seconds by what was waited for, of each where several shared the wait."""
        return {what: round(seconds / parts, 3) for what, seconds in self.seconds.items()}


def percentages(shares: Mapping[str, float]) -> str:
    """Shares for people, the largest first.

    >>> percentages({"output": 0.004, "input": 0.25})
    'input 25 %, output 0 %'
    """
    found = sorted(shares.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{what} {share:.0%}".replace("%", " %") for what, share in found)


class Depths:
    """How much is at each of several places, now and on average over time. For one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = self._last = clock()
        self._now, self._areas = defaultdict[str, float](float), defaultdict[str, float](float)

    @contextmanager
    def at(self, place: str, amount: float = 1) -> Iterator[None]:
        """So much is at a place for as long as the block lasts."""
        self._advance()
        self._now[place] += amount
        try:
            yield
        finally:
            self._advance()
            self._now[place] -= amount

    def mark(self) -> tuple[float, dict[str, float]]:
        """A moment for `since`."""
        self._advance()
        return self._last, dict(self._areas)

    def since(self, mark: tuple[float, dict[str, float]]) -> dict[str, float]:
        """Mean amount at each place since a moment."""
        now, areas = self.mark()
        passed = max(now - mark[0], 1e-9)
        return {
            place: round((area - mark[1].get(place, 0.0)) / passed, 4)
            for place, area in areas.items()
        }

    def _advance(self) -> None:
        now = self._clock()
        for place, amount in self._now.items():
            self._areas[place] += amount * (now - self._last)
        self._last = now


def prefetch(
    source: Iterable[T], depth: int = 2, *, wait: bool = False
) -> Generator[T, None, None]:
    """Run an iterable in a background thread, at most `depth` items ahead.

    An exception of the source is raised here in its place. Closing the iterator, or letting go
    of it, ends the thread after the item it is making; with `wait` closing returns after that, for
    a process that ends while the thread is inside native code is aborted. A source that is a
    generator is closed by the thread, before its exception is raised here.
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
            with closing(source) if isinstance(source, Generator) else nullcontext():
                for item in source:
                    put((False, item))
                    if stop.is_set():
                        return
        except BaseException as error:  # noqa: BLE001 - raised by the consumer
            end = (True, error)
        put(end)
        del end  # an error holds on to this frame, and what the frame holds to the error

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
        item = None
        stop.set()
        if wait:
            thread.join()


def applied(call: Callable[[T], R], source: Iterable[T]) -> Generator[R, None, None]:
    """Like `map`, but a source that is a generator ends with it, however it ends: who waits for
    what such a source holds would otherwise wait for the collector of garbage."""
    with closing(source) if isinstance(source, Generator) else nullcontext():
        for item in source:
            yield call(item)


def trailing(
    call: Callable[[T], R], source: Iterable[T], depth: int = 2, *, waits: Waits | None = None
) -> Generator[R, None, None]:
    """Apply a call to items in a background thread, while this one makes the next items.

    Results come in order, an exception of the call in the place of its result; at most `depth`
    items wait. `waits` counts the seconds that this thread waits for results.
    """
    waits = waits or Waits()
    waiting: deque[Future[R]] = deque()

    def oldest() -> R:
        with waits.on(OUTPUT):
            return waiting.popleft().result()

    with ThreadPoolExecutor(1, thread_name_prefix="trailing") as pool:
        for item in source:
            waiting.append(pool.submit(call, item))
            if len(waiting) > depth:
                yield oldest()
        while waiting:
            yield oldest()


class Lane:
    """The thread in which a worker's network runs: units have it whole, one after the other.

    A unit that comes while another has the lane prepares its first batches meanwhile, and what
    has left it is encoded and committed while the next one is in it. The thread stays from unit to
    unit: what a network allocates is then reused, where the memory of a thread that ends is given
    back, to be cleared page by page when the next one asks for it.
    """

    def __init__(self) -> None:
        keep_freed_memory(one_pool=True)
        torch = sys.modules.get("torch")
        self._threads = torch.get_num_threads() if torch is not None else 0
        begin = partial(_own_threads, self._threads) if torch is not None else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lane", initializer=begin)
        self._beside = ThreadPoolExecutor(max(self._threads, 1), thread_name_prefix="beside")
        self._niceness = os.getpriority(os.PRIO_PROCESS, 0) + GIVE_WAY
        self._turn = threading.Lock()
        self._free_since = -math.inf  # nobody had it yet

    def close(self) -> None:
        """Ends the threads, after what they are at."""
        self._thread.shutdown(cancel_futures=True)
        self._beside.shutdown(cancel_futures=True)

    def each(self, call: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """What a call makes of each item, in order; for stages beside the network, which may be
        fast enough to wait for a single core that decodes or encodes.

        They share as many threads as torch had when the lane was made: those of the worker's cores,
        also where its network is on a GPU. With one it is called here and now.

        Raises:
            Exception: of the first item whose call raised one; calls of others may have been made.
        """
        if self._threads <= 1:
            return [call(item) for item in items]
        return list(self._beside.map(self._aside(call), items))

    def pipelined(
        self,
        source: Iterable[Any],
        before: Callable[[Any], Any],
        work: Callable[[Any], Any],
        after: Callable[[Any], Any],
        depth: int = 2,
        *,
        waits: Waits | None = None,
    ) -> Generator[Any, None, None]:
        """Apply three stages to each item in order, all three at the same time.

            lane.pipelined(batches, decode, network, encode)  # the network waits for neither

        `work` runs in the lane, the others in threads of their own. These give way to it, and
        torch has a single thread in them, so that they take a core each at most. `waits` counts the
        seconds that the lane waits, for the stage before it as `INPUT` and for the one after it as
        `OUTPUT`.
        """
        waits = waits or Waits()
        ready = prefetch(applied(self._aside(before), source), depth)
        with closing(self._through(work, ready, waits)) as made:
            yield from trailing(self._aside(after), made, depth, waits=waits)

    def _through(
        self, work: Callable[[T], R], ready: Iterator[T], waits: Waits
    ) -> Generator[R, None, None]:
        """What the work makes of items, of which the first is waited for before the lane is."""
        began = time.monotonic()
        with waits.on(INPUT):
            first = list(islice(ready, 1))
            self._turn.acquire()
        try:
            taken = max(0.0, self._free_since - began)
            waits.seconds[INPUT] -= taken
            waits.turn += taken
            for item in chain(first, waits.each(ready, INPUT)):
                yield self._thread.submit(work, item).result()
        finally:
            self._free_since = time.monotonic()
            self._turn.release()

    def _aside(self, call: Callable[[T], R]) -> Callable[[T], R]:
        """A call for a thread beside the lane. It gives way where both want a core, and in it torch
        has a single thread."""
        threads, niceness = self._threads, self._niceness

        def run(item: T) -> R:
            if sys.platform == "linux":  # elsewhere niceness is that of the whole process
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
            if not threads:
                return call(item)
            _own_threads(1)
            try:
                return call(item)
            finally:
                _own_threads(threads)

        return run


def _own_threads(count: int) -> None:
    """Set how many threads torch has in this one, for good; and, as torch does, in those that begin
    later: not in those that have asked once, which every thread of ours does here."""
    torch = sys.modules["torch"]
    torch.get_num_threads()  # else its first operation would take what another thread set last
    torch.set_num_threads(count)
