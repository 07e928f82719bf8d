"""What a host's ``robots.txt`` lets us fetch, by the rules of RFC 9309.

Each origin is asked once and remembered. A host that cannot say what it allows is not asked for
pictures either: the rows that wait for it end as its ``robots.txt`` did, and later ones ask again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from protego import Protego
from yarl import URL

PRODUCT = "fourm"
"""The name by which rules may address us."""
MAX_RULES = 512_000
"""Bytes of a file that are read; the RFC asks for 500 KiB at least."""
MAX_ORIGINS, MAX_BYTES = 20_000, 32_000_000
"""Origins, and bytes of their files, that are remembered: the latest."""


@dataclass(frozen=True)
class Refusal:
    """Why a URL is not asked for: a reason class, and a detail for people."""

    reason: str
    detail: str
    passing: bool = False
    """Whether the host may answer when it is asked again."""


Answer = bytes | Refusal | None
"""Of a host about its rules: the file, why there is no saying, or that it has no such file."""


class Robots:
    """Rules of the hosts that were asked so far.

    Lives in one event loop.

    Args:
        ask: gets a host's file; it must not raise.
    """

    def __init__(self, ask: Callable[[URL], Awaitable[Answer]]) -> None:
        self._ask = ask
        self._rules: dict[URL, asyncio.Task[Protego | Refusal | None]] = {}
        self._sizes: dict[URL, int] = {}
        self._bytes = 0

    async def refusal(self, url: URL) -> Refusal | None:
        """Why the URL may not be fetched; None if it may."""
        origin = url.origin()
        asking = self._rules.pop(origin, None) or asyncio.create_task(self._learn(origin))
        self._rules[origin] = asking  # the latest at the end
        self._forget()
        # Others wait for the same answer: whoever stops waiting must not stop the asking.
        rules = await asyncio.shield(asking)
        if isinstance(rules, Refusal):
            if rules.passing and self._rules.get(origin) is asking:
                del self._rules[origin]
            return rules
        if rules is None or rules.can_fetch(str(url), PRODUCT):
            return None
        return Refusal("robots", f"robots.txt of {origin} disallows {url.raw_path_qs}")

    async def _learn(self, origin: URL) -> Protego | Refusal | None:
        answer = await self._ask(origin / "robots.txt")
        if not isinstance(answer, bytes):
            return answer
        if origin in self._rules:
            self._sizes[origin] = min(len(answer), MAX_RULES)
            self._bytes += self._sizes[origin]
        return Protego.parse(answer[:MAX_RULES].decode("utf-8", "replace"))

    def _forget(self) -> None:
        while len(self._rules) > 1 and (len(self._rules) > MAX_ORIGINS or self._bytes > MAX_BYTES):
            oldest = next(iter(self._rules))
            del self._rules[oldest]
            self._bytes -= self._sizes.pop(oldest, 0)
