"""Turns at hosts: all workers of a run together connect to one no more often than is polite.

How many workers a run has is known before it begins. Where they are no more than the turns at a
host, each has a share of its own and nobody asks anybody. Where they are more, a share would be
less than one: then each turn is lent, to one worker at a time and for a few requests in a row, by
a keeper in an actor of the run's own. That actor also passes on the pauses that hosts ask for.

A loan ends by itself. The keeper forgets a worker that it has not heard of for so long that
nothing can be under way any more, and a worker begins nothing that its keeper could have
forgotten: both go by their own clock alone. What is said is said in full each time, so a lost
message costs nothing, and a keeper that takes over from a dead one first waits until whatever that
one had lent has run out.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from itertools import islice
from typing import Protocol
from weakref import WeakValueDictionary

from infra.pauses import Left, Pause, Pauses, extend, left

log = logging.getLogger("fourm.turns")

LEASE = 10.0
"""Seconds after a message to the keeper in which requests may begin on what it has lent."""
IN_A_ROW = 8
"""Requests on one loan, which share a connection; then other workers have their turn."""
POLL = 0.2
"""Seconds between messages to the keeper while rows wait for a turn."""
GATHER = 0.05
"""Seconds for which news to the keeper are gathered: many rows begin and end together."""
PATIENCE = 120.0
"""Seconds without a word of the keeper after which rows wait for it no longer."""

WORKERS, KEEPER = "FOURM_WORKERS", "FOURM_TURNS"
"""Environment of a worker: how many the run has, and the name of its keeper's actor."""


class Turns(Protocol):
    """Who may connect to a host now."""

    def at(self, host: str) -> AbstractAsyncContextManager[bool]:
        """A turn at a host for one request; whether to close the connection after it.

        Raises:
            ConnectionError: turns are not to be had any more.
        """
        ...

    async def close(self) -> None:
        """Ends what runs in the background."""
        ...


class OwnTurns:
    """So many turns at each host, for one worker alone. Lives in one event loop."""

    def __init__(self, turns: int) -> None:
        self._turns = turns
        self._hosts = WeakValueDictionary[str, asyncio.Semaphore]()

    @asynccontextmanager
    async def at(self, host: str) -> AsyncIterator[bool]:
        """As `Turns.at`; a host is remembered while somebody waits there or has passed."""
        turn = self._hosts.get(host)
        if turn is None:
            turn = self._hosts[host] = asyncio.Semaphore(self._turns)
        async with turn:
            yield False

    async def close(self) -> None:
        """As `Turns.close`."""


class Keeper:
    """Lends turns at hosts to the workers of a run, one to a worker, first come, first served.

    It also passes on the pauses that hosts ask for.

    Args:
        turns: at each host.
        clock: seconds that only grow.
        restarted: whether this keeper takes over from one that died.
    """

    def __init__(
        self,
        turns: int,
        clock: Callable[[], float] = time.monotonic,
        restarted: Callable[[], bool] | None = None,
    ) -> None:
        self._turns, self._clock = turns, clock
        self._restarted = restarted or _restarted
        self._began: float | None = None
        self._until: dict[str, float] = {}
        self._said: dict[str, tuple[set[str], set[str]]] = {}
        self._holding: dict[str, dict[str, None]] = {}
        self._waiting: dict[str, dict[str, None]] = {}
        self._pauses: dict[str, Pause] = {}

    def pauses(self, told: Left) -> Left:
        """Take note of the pauses that a worker was told of; all that workers were told of."""
        now = self._clock()
        extend(self._pauses, told, now)
        return left(self._pauses, now)

    def exchange(
        self, worker: str, seconds: float, using: list[str], wanting: list[str]
    ) -> list[str]:
        """Take note of what a worker does, and lend it what is free.

        Args:
            worker: a name of its own.
            seconds: after which nothing of it can be under way if it is not heard of again.
            using: hosts at which it has a turn and keeps it.
            wanting: hosts at which it needs one.

        Returns:
            Those of `wanting` at which it has a turn from now on.
        """
        now = self._clock()
        if self._began is None:
            self._began = now if self._restarted() else now - seconds
        for silent in [name for name, until in self._until.items() if until < now]:
            del self._until[silent]
            self._note(silent, (), ())
            del self._said[silent]
        self._until[worker] = now + seconds
        self._note(worker, using, wanting)
        if now < self._began + seconds:
            return []
        lent = [host for host in wanting if self._is_next(host, worker)]
        self._note(worker, [*using, *lent], set(wanting).difference(lent))
        return lent

    def _note(self, worker: str, using: Iterable[str], wanting: Iterable[str]) -> None:
        said = (set(using), set(wanting))
        lines = (self._holding, self._waiting)
        for line, old, new in zip(lines, self._said.get(worker, (set(), set())), said, strict=True):
            for host in old - new:
                del line[host][worker]
                if not line[host]:
                    del line[host]
            for host in new - old:
                line.setdefault(host, {})[worker] = None
        self._said[worker] = said

    def _is_next(self, host: str, worker: str) -> bool:
        free = self._turns - len(self._holding.get(host, ()))
        return worker in islice(self._waiting[host], max(free, 0))


def _restarted() -> bool:
    if "ray" not in sys.modules:
        return False
    import ray

    return ray.is_initialized() and ray.get_runtime_context().was_current_actor_reconstructed


class _Place:
    """A host at which rows of this worker wait, or one is at work."""

    def __init__(self) -> None:
        self.rows = 0
        self.left = 0
        """Requests for which the loan is still good; 0 without one."""
        self.busy = False
        self.first = asyncio.Lock()
        self.lent = asyncio.Event()


class LentTurns:
    """At most one turn at each host, borrowed from a keeper. Lives in one event loop.

    Args:
        ask: `Keeper.exchange`, wherever the keeper lives.
        longest: seconds that a request may take.
    """

    def __init__(self, ask: Callable[..., Awaitable[list[str]]], longest: float) -> None:
        self._ask, self._longest = ask, longest
        self._name = uuid.uuid4().hex
        self._places: dict[str, _Place] = {}
        self._news = asyncio.Event()
        self._heard = time.monotonic()
        self._until = 0.0
        self._complained = 0.0
        self._broken = ""
        self._talking: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def at(self, host: str) -> AsyncIterator[bool]:
        """As `Turns.at`."""
        if self._talking is None:
            self._talking = asyncio.create_task(self._talk())
        place = self._places.setdefault(host, _Place())
        place.rows += 1
        try:
            async with place.first:
                await self._loan(place)
                place.left -= 1
                place.busy = True
                try:
                    # The last request on a loan closes the connection: others open theirs now.
                    yield place.left == 0 or place.rows == 1
                finally:
                    place.busy = False
        finally:
            place.rows -= 1
            if not place.left or not place.rows:
                self._give_back(place)
            if not place.rows:
                del self._places[host]

    async def _loan(self, place: _Place) -> None:
        while not place.left or time.monotonic() >= self._until:
            if self._broken:
                raise ConnectionError(self._broken)
            if place.left:  # lapsed, as nothing was heard of the keeper: it must lend anew
                self._give_back(place)
            self._news.set()
            await place.lent.wait()

    def _give_back(self, place: _Place) -> None:
        place.left = 0
        place.lent.clear()
        self._news.set()

    async def close(self) -> None:
        """As `Turns.close`; the keeper forgets this worker by itself."""
        if self._talking:
            self._talking.cancel()
            await asyncio.gather(self._talking, return_exceptions=True)

    async def _talk(self) -> None:
        while not self._broken:
            # Often while rows wait, and else in time to keep what is lent.
            waiting = any(not place.left for place in self._places.values())
            pause = POLL if waiting else LEASE / 4 if self._places else None
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._news.wait()
            await asyncio.sleep(GATHER)
            self._news.clear()
            await self._exchange()

    async def _exchange(self) -> None:
        sent = time.monotonic()
        if sent >= self._until:  # what was lent may be another's by now
            for place in self._places.values():
                self._give_back(place)
        using = [host for host, place in self._places.items() if place.left or place.busy]
        wanting = list(self._places.keys() - using)
        try:
            async with asyncio.timeout(LEASE):
                lent = await self._ask(self._name, LEASE + self._longest, using, wanting)
        except Exception as error:  # noqa: BLE001 - whatever keeps it from answering
            self._miss(error)
            await asyncio.sleep(POLL)
            self._news.set()  # it has to be said all the same
            return
        self._heard, self._until, self._complained = time.monotonic(), sent + LEASE, 0.0
        for host in lent:
            if host in self._places:
                self._places[host].left = IN_A_ROW
                self._places[host].lent.set()

    def _miss(self, error: Exception) -> None:
        silence = time.monotonic() - self._heard
        what = f"no turn at a host is to be had for {silence:.0f} s: {error!r}"
        if silence > PATIENCE:
            self._broken = what
            for place in self._places.values():
                place.lent.set()
        if silence > self._complained + LEASE:
            self._complained = silence
            log.warning("%s", what)


@contextmanager
def keeper(turns: int, workers: int) -> Iterator[dict[str, str]]:
    """Environment of the workers of a run on Ray, which share turns and pauses at hosts.

    Args:
        turns: at each host; 0 where the run has nothing to do with hosts.
        workers: of the run, at most.
    """
    variables = {WORKERS: str(workers), KEEPER: ""}
    if not turns or workers < 2:
        yield variables
        return
    import ray

    name = f"turns-{uuid.uuid4().hex}"
    # Of this process: it ends with it, and unlike a worker's outlives the workers.
    actor = ray.remote(Keeper).options(name=name, num_cpus=0, max_restarts=-1).remote(turns)
    yield variables | {KEEPER: name}
    del actor  # nobody else holds on to it: Ray ends it


def turns_of_run(turns: int, longest: float) -> Turns:
    """This worker's part of the turns that all workers of its run have at a host.

    Args:
        turns: of the whole run.
        longest: seconds that a request may take.
    """
    workers = int(os.environ.get(WORKERS, "1"))
    if turns < workers and (name := os.environ.get(KEEPER, "")):
        import ray

        return LentTurns(ray.get_actor(name).exchange.remote, longest)
    return OwnTurns(max(1, turns // workers))


def pauses_of_run() -> Pauses:
    """The pauses at hosts that any worker of this one's run is told of."""
    if name := os.environ.get(KEEPER, ""):
        import ray

        return Pauses(ray.get_actor(name).pauses.remote)
    return Pauses()
