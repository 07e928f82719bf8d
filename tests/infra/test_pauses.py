"""A pause that a host asks for is kept by all rows of it, those of other workers too."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from infra import pauses
from infra.download import Downloader, DownloadPolicy
from infra.pauses import Left, Pauses
from infra.turns import Keeper
from tests.infra.test_turns import ADDRESSES, at_once, keeper


class Busy:
    """A host that is too busy for the first row it is asked for, and says for how long."""

    def __init__(self, status: int, pause: str | None, meet: int = 1) -> None:
        self._status, self._headers = status, {"Retry-After": pause} if pause else {}
        self._meet, self._met, self.heeded = meet, asyncio.Event(), asyncio.Event()
        self.asked: list[float] = []
        self.refused = 0.0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        app = web.Application()
        app.router.add_get("/{row}", self._answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield runner.addresses[0][1]
        await runner.cleanup()

    async def _answer(self, _: web.Request) -> web.Response:
        self.asked.append(time.monotonic())
        first = len(self.asked) == 1
        if len(self.asked) >= self._meet:
            self._met.set()
        await self._met.wait()
        if not first:
            await self.heeded.wait()  # those that were under way end when the pause has begun
            return web.Response(body=b"x")
        self.refused = time.monotonic()
        return web.Response(status=self._status, headers=self._headers)


async def reasons(urls: list[str], **policy: float) -> list[str]:
    downloader = Downloader(DownloadPolicy(addresses=ADDRESSES, **policy))
    async with asyncio.timeout(120):
        found = {each.index: each.reason async for each in downloader.each(urls)}
    await downloader.close()
    return [found[index] for index in range(len(urls))]


@pytest.mark.parametrize(
    ("status", "pause", "seconds"), [(429, "1", 1.0), (503, "1", 1.0), (429, None, 0.6)]
)
def test_a_pause_that_a_host_asks_for_is_kept_by_all_rows_of_it(
    monkeypatch, status, pause, seconds
):
    heed = Downloader._heed

    async def scenario():
        host = Busy(status, pause, meet=4)  # four are under way when it says so

        def heeded(*words: object) -> None:
            heed(*words)
            host.heeded.set()

        monkeypatch.setattr(Downloader, "_heed", heeded)
        async with host.serving() as port:
            urls = [f"http://127.0.0.1:{port}/{row}" for row in range(12)]
            found = await reasons(urls, per_host=4, backoff=0.6, attempts=2)
        return found, host

    found, host = asyncio.run(scenario())
    assert found == ["ok"] * 12
    assert len(host.asked) == 13
    later = [moment for moment in host.asked if moment > host.refused]
    assert len(later) >= 8
    assert min(later) >= host.refused + seconds


def test_a_host_that_asks_for_more_than_a_row_can_wait_is_left_to_a_later_pass():
    async def scenario():
        busy, other = Busy(429, "3600"), Busy(200, None)
        other.heeded.set()
        async with busy.serving() as port, other.serving() as free:
            urls = [f"http://127.0.0.1:{port}/{row}" for row in range(6)]
            found = await reasons([*urls, f"http://localhost:{free}/7"], per_host=1)
        return found, len(busy.asked), len(other.asked)

    assert asyncio.run(scenario()) == (["rate_limited"] * 6 + ["ok"], 1, 1)


def test_a_pause_is_passed_on_until_it_ends_and_the_longest_counts():
    each, clock = keeper(1)
    assert each.pauses({}) == {}
    assert each.pauses({"h": (5.0, "rate_limited")}) == {"h": (5.0, "rate_limited")}
    clock[0] = 2.0
    told = each.pauses({"h": (1.0, "server_error"), "g": (4.0, "server_error")})
    assert told == {"h": (3.0, "rate_limited"), "g": (4.0, "server_error")}
    clock[0] = 5.0
    assert each.pauses({"h": (-2.0, "rate_limited")}) == {"g": (1.0, "server_error")}


async def learnt(worker: Pauses, host: str) -> None:
    async with asyncio.timeout(120):
        while worker.at(host) is None:
            await asyncio.sleep(0.001)


def test_a_pause_that_one_worker_is_asked_for_is_kept_by_the_others(monkeypatch):
    monkeypatch.setattr(pauses, "SHARE", 0.01)
    kept = Keeper(8, restarted=lambda: False)

    async def scenario():
        busy, policy = Busy(429, "3600"), DownloadPolicy(addresses=ADDRESSES)
        shared = [Pauses(at_once(kept.pauses)) for _ in range(2)]
        told, other = (Downloader(policy, pauses=each) for each in shared)
        async with busy.serving() as port:
            url = f"http://127.0.0.1:{port}/1"
            first = [each.reason async for each in told.each([url])]
            await learnt(shared[1], "127.0.0.1")
            rest = [each async for each in other.each([url] * 5)]
        for worker in (told, other):
            await worker.close()
        return first, rest, len(busy.asked)

    first, rest, asked = asyncio.run(scenario())
    assert (first, asked) == (["rate_limited"], 1)
    assert {(each.reason, each.retry_after > 3000) for each in rest} == {("rate_limited", True)}


def test_a_pause_is_told_at_once_as_its_worker_may_soon_have_no_rows_left(monkeypatch):
    monkeypatch.setattr(pauses, "SHARE", 1000.0)
    kept = Keeper(8, restarted=lambda: False)

    async def scenario():
        worker = Pauses(at_once(kept.pauses))
        assert worker.at("h") is None
        worker.begin("h", 1000.0, "rate_limited")
        async with asyncio.timeout(120):
            while not (found := kept.pauses({})):
                await asyncio.sleep(0.001)
        await worker.close()
        return found

    assert list(asyncio.run(scenario())) == ["h"]


def test_pauses_are_told_again_when_the_keeper_dies_or_messages_are_lost(monkeypatch):
    monkeypatch.setattr(pauses, "SHARE", 0.001)
    drawn = random.Random(0)

    async def lossy(told: Left) -> Left:
        kept = Keeper(8, restarted=lambda: True) if drawn.random() < 0.5 else living
        answer = kept.pauses(told)
        if drawn.random() < 0.5:
            raise OSError("lost on its way back")
        return answer

    living = Keeper(8, restarted=lambda: False)

    async def scenario():
        told, other = Pauses(lossy), Pauses(lossy)
        told.begin("h", 1000.0, "rate_limited")
        await asyncio.gather(learnt(told, "h"), learnt(other, "h"))
        await told.close()
        await other.close()
        return other.at("h")

    assert asyncio.run(scenario()).reason == "rate_limited"


def test_a_pause_said_again_a_moment_later_is_no_new_one():
    known: dict[str, pauses.Pause] = {}
    pauses.extend(known, {"h": (5.0, "rate_limited")}, now=10.0, by=1.0)
    first = known["h"]
    pauses.extend(known, {"h": (4.5, "rate_limited")}, now=11.0, by=1.0)
    assert known["h"] is first
    pauses.extend(known, {"h": (6.0, "server_error")}, now=11.0, by=1.0)
    assert known == {"h": pauses.Pause(17.0, "server_error")}
    pauses.extend(known, {}, now=17.0)
    assert known == {}
