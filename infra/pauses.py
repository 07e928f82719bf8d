"""Pauses that hosts ask for: all workers of a run keep them.

A worker keeps what it is told itself, and tells the keeper of the run at once. Every second it
asks what others were told. Each message says all there is to say: a lost one costs a second.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

log = logging.getLogger("fourm.pauses")

SHARE = 1.0
"""Seconds from message to message without news. Pauses that end within so many are the same."""

Left = dict[str, tuple[float, str]]
"""Host to the seconds that are left of its pause, and the reason class of rows that it costs."""


@dataclass(frozen=True)
class Pause:
    """Which a host asked for."""

    until: float
    """On the clock of whoever holds it."""
    reason: str


class Pauses:
    """The pauses that a worker knows of. Lives in one event loop.

    Args:
        ask: `infra.turns.Keeper.pauses`, wherever the keeper lives; None without other workers.
    """

    def __init__(self, ask: Callable[[Left], Awaitable[Left]] | None = None) -> None:
        self._ask = ask
        self._told: dict[str, Pause] = {}
        self._known: dict[str, Pause] = {}
        self._news = asyncio.Event()
        self._sharing: asyncio.Task[None] | None = None

    def at(self, host: str) -> Pause | None:
        """The latest pause that is known of a host; it may have ended."""
        if self._ask and self._sharing is None:
            self._sharing = asyncio.create_task(self._share(self._ask))
        return self._known.get(host)

    def begin(self, host: str, seconds: float, reason: str) -> None:
        """Take note that a host asked this worker for a pause from now on."""
        for known in (self._told, self._known):
            extend(known, {host: (seconds, reason)}, time.monotonic())
        self._news.set()

    async def close(self) -> None:
        """Ends what runs in the background."""
        if self._sharing:
            self._sharing.cancel()
            await asyncio.gather(self._sharing, return_exceptions=True)

    async def _share(self, ask: Callable[[Left], Awaitable[Left]]) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(SHARE):
                    await self._news.wait()
            self._news.clear()
            try:
                async with asyncio.timeout(10 * SHARE):
                    found = await ask(left(self._told, time.monotonic()))
            except Exception as error:  # noqa: BLE001 - whatever keeps it from answering
                log.debug("pauses at hosts are not shared: %r", error)
                continue
            extend(self._known, found, time.monotonic(), by=SHARE)


def left(pauses: dict[str, Pause], now: float) -> Left:
    """What is left of pauses at a moment."""
    return {host: (each.until - now, each.reason) for host, each in pauses.items()}


def extend(pauses: dict[str, Pause], found: Left, now: float, by: float = 0.0) -> None:
    """Drop pauses that have ended, and add those that are new or longer by so many seconds."""
    for host in [host for host, each in pauses.items() if each.until <= now]:
        del pauses[host]
    for host, (seconds, reason) in found.items():
        if seconds > 0 and (host not in pauses or pauses[host].until + by < now + seconds):
            pauses[host] = Pause(now + seconds, reason)
