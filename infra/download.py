"""Bounded, polite downloads of many URLs.

Every download ends in one :class:`Download` with a reason class; nothing raises for what a server
does. Bodies are read up to a limit, without content decoding (no gzip bombs), proxies from the
environment are ignored, and every redirect is checked like the first URL.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urljoin, urlsplit

import aiohttp
from yarl import URL

from infra.addresses import AddressPolicy, BlockedAddress, PublicResolver
from infra.overlap import Depths
from infra.pauses import Pauses
from infra.robots import PRODUCT, Answer, Refusal, Robots
from infra.turns import OwnTurns, Turns

USER_AGENT = f"{PRODUCT} (image dataset builder; honours X-Robots-Tag)"
# RFC 3986 without brackets, and without the segments "." and "..", which are no part of a path.
_AS_IT_IS = re.compile(
    r"[a-z]+://[^/?#]*(?:(?!/\.\.?(?:[/?#]|$))(?:[\w\-.~!$&'()*+,;=:@/]|%[0-9a-f]{2}))*"
    r"(?:\?(?:[\w\-.~!$&'()*+,;=:@/?]|%[0-9a-f]{2})*)?(?:#.*)?", re.ASCII | re.IGNORECASE
)
OPT_OUT = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
_VALUES = re.compile(r"(max-[a-z-]+|unavailable_after)\s*:\s*[^\s,;]*")
RETRYABLE = frozenset({"timeout", "connect", "dns", "rate_limited", "server_error", "truncated"})
"""Reason classes that another attempt may mend."""
NETWORK = frozenset({"timeout", "connect", "dns"})
"""Reason classes that, when nearly all rows show them, mean our own network is down."""


@dataclass(frozen=True, kw_only=True)
class DownloadPolicy:
    """Limits and manners of a download."""

    timeout: float = 15.0
    """Seconds for one attempt, from connecting to the last byte."""
    max_bytes: int = 20_000_000
    """Longest body that is read."""
    max_redirects: int = 5
    attempts: int = 3
    """Attempts for failures that are worth a retry."""
    backoff: float = 0.5
    """Seconds before the second attempt; doubles with each further one, with jitter."""
    concurrency: int = 256
    """Downloads of a worker under way at once: most of them wait."""
    per_host: int = 8
    """Connections to one host at once, of all workers of a run together."""
    honour_opt_out: bool = True
    """Drop pictures whose X-Robots-Tag forbids indexing or training."""
    honour_robots: bool = False
    """Ask each host's robots.txt first, and fetch only what it allows."""
    addresses: AddressPolicy = field(default_factory=AddressPolicy)


@dataclass(frozen=True)
class Download:
    """How one URL ended: ``reason`` is "ok" or a class; ``detail`` is for people."""

    index: int
    reason: str
    detail: str = ""
    body: bytes = b""
    retry_after: float | None = None


class Downloader:
    """Downloads under one policy, for as many lists at once as there are.

    Connections, turns at a host and the number of downloads under way are shared. Lists are begun
    in the order they came: while the last rows of one wait for slow servers, the next begins.
    A host that asks for a pause gets it from all rows.

    Lives in one event loop; `close` it there.

    Args:
        policy: limits and manners.
        turns: this worker's part of the turns at a host; all of them if it is the only worker.
        pauses: those that other workers hear of too; its own if it is the only worker.
    """

    def __init__(
        self, policy: DownloadPolicy, turns: Turns | None = None, pauses: Pauses | None = None
    ) -> None:
        self._policy = policy
        self._turns = turns or OwnTurns(policy.per_host)
        self._pauses = pauses or Pauses()
        self.depths = Depths()
        """Rows "at_hosts", waiting for their turn, and "requests" that were sent."""
        self._slots = asyncio.Semaphore(policy.concurrency)
        self._beginning = asyncio.Lock()
        self._robots = Robots(self._ask_rules) if policy.honour_robots else None
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=policy.concurrency,
                resolver=PublicResolver(policy.addresses),
                ttl_dns_cache=300,
                # Lists name many hosts: connections that are kept long become too many.
                keepalive_timeout=5,
            ),
            trust_env=False,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity", "Accept": "image/*"},
            # One attempt is timed as a whole, after it got its turn at the host.
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def close(self) -> None:
        """Closes all connections."""
        await self._session.close()
        await self._turns.close()
        await self._pauses.close()

    async def each(self, urls: Sequence[str]) -> AsyncIterator[Download]:
        """Downloads in completion order; ``index`` tells which URL."""
        ended: asyncio.Queue[asyncio.Task[Download]] = asyncio.Queue()
        begun: set[asyncio.Task[Download]] = set()

        async def begin() -> None:
            async with self._beginning:
                for index, url in enumerate(urls):
                    await self._slots.acquire()
                    task = asyncio.create_task(self._persist(index, url))
                    begun.add(task)
                    task.add_done_callback(ended.put_nowait)

        beginning = asyncio.create_task(begin())
        try:
            for _ in urls:
                task = await ended.get()
                begun.discard(task)
                self._slots.release()  # not before: what is not taken yet occupies memory
                yield task.result()
        finally:
            beginning.cancel()
            for task in begun:
                task.cancel()
                self._slots.release()

    async def _persist(self, index: int, url: str) -> Download:
        """One URL with retries: exponential backoff with jitter, at least Retry-After."""
        policy = self._policy
        for attempt in range(1, policy.attempts + 1):
            result = await self._attempt(index, url)
            if result.reason not in RETRYABLE or attempt == policy.attempts:
                break
            pause = policy.backoff * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
            asked_for = result.retry_after or 0.0
            if asked_for > policy.timeout:
                break  # longer than a slot is held for one row: a later pass takes it up
            await asyncio.sleep(max(pause, asked_for))
        return result

    async def _ask_rules(self, url: URL) -> Answer:
        """A host's robots.txt; what it answers without one allows everything (RFC 9309, 2.3.1)."""
        found = await self._attempt(0, str(url), rules=True)
        if found.reason == "ok":
            return found.body
        passing = found.reason in RETRYABLE
        if passing or found.reason == "too_large":
            return Refusal(found.reason, f"{url}: {found.detail}", passing)
        return None

    async def _attempt(self, index: int, url: str, rules: bool = False) -> Download:
        """One attempt; `rules` are asked for whatever the rules and headers say of pictures."""
        try:
            return await self._follow(index, as_written(url), rules)
        except BlockedAddress as error:
            return Download(index, "blocked_address", str(error))
        except TimeoutError:
            limit = self._policy.timeout
            return Download(index, "timeout", f"no complete answer within {limit:g} s")
        except aiohttp.ClientConnectorDNSError as error:
            return _connection_failure(index, error, "dns")
        except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError) as error:
            return Download(index, "truncated", str(error))
        except aiohttp.InvalidURL as error:
            return Download(index, "bad_url", str(error))
        except (aiohttp.ClientConnectionError, OSError) as error:
            return _connection_failure(index, error, "connect")
        except aiohttp.ClientError as error:
            return Download(index, "bad_answer", str(error))
        except ValueError as error:
            return Download(index, "bad_url", str(error))

    async def _follow(self, index: int, url: URL, rules: bool) -> Download:
        left = self._policy.timeout
        for _ in range(self._policy.max_redirects + 1):
            self._policy.addresses.check(url)
            if self._robots and not rules and (refused := await self._robots.refusal(url)):
                return Download(index, refused.reason, refused.detail)
            found, took = await self._ask(index, url, rules, left)
            left -= took
            if isinstance(found, Download):
                return found
            url = found
        return Download(index, "too_many_redirects", f"more than {self._policy.max_redirects}")

    async def _ask(
        self, index: int, url: URL, rules: bool, limit: float
    ) -> tuple[Download | URL, float]:
        """What a host says, and the seconds it took to; waiting for a turn is no slowness of it."""
        host = url.host or ""
        while True:
            pause = self._pauses.at(host)
            wait = pause.until - time.monotonic() if pause else 0.0
            if pause and wait > self._policy.timeout:
                detail = f"{host} asked for a pause, of which {wait:.0f} s are left"
                return Download(index, pause.reason, detail, retry_after=wait), 0.0
            async with AsyncExitStack() as turn:
                with self.depths.at("at_hosts"):
                    if wait > 0:
                        await asyncio.sleep(wait)
                    last = await turn.enter_async_context(self._turns.at(host))
                if self._pauses.at(host) is not pause:
                    continue  # somebody else was asked to wait meanwhile
                began = time.monotonic()
                with self.depths.at("requests"):
                    async with asyncio.timeout(limit):
                        found = await self._get(index, url, rules, last)
                if isinstance(found, Download):
                    self._heed(host, found)
                return found, time.monotonic() - began

    def _heed(self, host: str, found: Download) -> None:
        """Remember the pause that a host asks for, be it only by saying that it is too much."""
        seconds = found.retry_after or 0.0
        if found.reason == "rate_limited":
            seconds = max(seconds, self._policy.backoff)
        if seconds and found.reason in RETRYABLE:
            self._pauses.begin(host, seconds, found.reason)

    async def _get(self, index: int, url: URL, rules: bool, last: bool) -> Download | URL:
        """What a URL holds, or where it leads; the connection is closed after the last request."""
        policy = self._policy
        headers = {"Connection": "close"} if last else None
        async with self._session.get(url, allow_redirects=False, headers=headers) as answer:
            if answer.status in (301, 302, 303, 307, 308) and "Location" in answer.headers:
                return as_written(urljoin(str(url), answer.headers["Location"]))
            if answer.status != 200:
                return _refused(index, answer)
            if policy.honour_opt_out and not rules and _opted_out(answer):
                return Download(index, "opt_out", answer.headers.get("X-Robots-Tag", ""))
            return await _body(index, answer, policy.max_bytes)


def as_written(text: str) -> URL:
    """A URL whose path and query go to the server as they stand, where they hold nothing that has
    to be quoted: of a signed one other bytes of the same meaning may be refused.

    Raises:
        ValueError: it is no URL.
    """
    try:
        url = URL(text)
    except IndexError as error:  # of yarl, at brackets without an address
        raise ValueError(f"{text[:200]!r} is no URL") from error
    if str(url) == text or not (url.raw_host and _AS_IT_IS.fullmatch(text)):
        return url  # most are written already as they go out
    parts = urlsplit(text)
    return URL.build(
        scheme=url.scheme, authority=url.raw_authority, path=parts.path or "/",
        query_string=parts.query, encoded=True,
    )  # fmt: skip


def _connection_failure(index: int, error: BaseException, reason: str) -> Download:
    """aiohttp wraps what the resolver raises; the reason lies in the chain of causes."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, BlockedAddress):
            return Download(index, "blocked_address", str(cause))
        cause = cause.__cause__ or cause.__context__
    return Download(index, reason, str(error))


def _refused(index: int, answer: aiohttp.ClientResponse) -> Download:
    status = answer.status
    reasons = {404: "not_found", 410: "not_found", 401: "forbidden", 403: "forbidden"}
    reason = reasons.get(status, "server_error" if status >= 500 else "http_error")
    if status == 429:
        reason = "rate_limited"
    pause = _retry_after(answer.headers.get("Retry-After"), answer.headers.get("Date"))
    return Download(index, reason, f"HTTP {status}", retry_after=pause)


def _retry_after(value: str | None, date: str | None = None) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date (RFC 9110). A date is one of
    the server's clock, which its Date header tells."""
    if value is None:
        return None
    try:
        if value.strip().isdecimal():
            return float(value)
        until = _moment(value)
        return None if until is None else \
            max((until - (_moment(date) or datetime.now(UTC))).total_seconds(), 0.0)
    except (ValueError, OverflowError):
        return None


def _moment(date: str | None) -> datetime | None:
    try:
        found = parsedate_to_datetime(date or "")
    except (TypeError, ValueError, OverflowError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _opted_out(answer: aiohttp.ClientResponse) -> bool:
    return any(forbids(header) for header in answer.headers.getall("X-Robots-Tag", []))


def forbids(header: str) -> bool:
    """Whether an X-Robots-Tag, "agent: directive, directive", keeps us from taking a picture.

    Directives for a named agent other than us don't bind, up to the next agent that is named. A
    colon may also stand behind a directive that takes a value, such as max-snippet.
    """
    ours = True
    for part in re.split("[,;]", _VALUES.sub(" ", header.lower())):
        agent, colon, words = part.partition(":")
        if colon and len(agent.split()) == 1:
            ours, part = agent.strip() in ("*", PRODUCT), words
        if ours and OPT_OUT.intersection(part.split()):
            return True
    return False


async def _body(index: int, answer: aiohttp.ClientResponse, max_bytes: int) -> Download:
    declared = answer.content_length
    if declared is not None and declared > max_bytes:
        return Download(index, "too_large", f"{declared} bytes declared, limit {max_bytes}")
    pieces, size = [], 0
    async for piece in answer.content.iter_any():
        pieces.append(piece)
        size += len(piece)
        if size > max_bytes:
            return Download(index, "too_large", f"more than {max_bytes} bytes")
    return Download(index, "ok", body=b"".join(pieces))
