"""All workers of a run together connect to a host no more often than is polite."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
from aiohttp import web

from infra import pauses, turns
from infra.addresses import AddressPolicy
from infra.download import Downloader, DownloadPolicy
from infra.pauses import Left, Pauses
from infra.turns import Keeper, LentTurns, turns_of_run

ADDRESSES = AddressPolicy(frozenset({"127.0.0.1", "localhost"}))
RULES = b"User-agent: *\nDisallow: /private\n"


def keeper(places: int, *, restarted: bool = False) -> tuple[Keeper, list[float]]:
    """A keeper and its clock."""
    clock = [0.0]
    return Keeper(places, clock=lambda: clock[0], restarted=lambda: restarted), clock


def test_a_turn_is_lent_to_whoever_came_first_and_to_no_more_than_there_are():
    each, _ = keeper(2)
    assert [each.exchange(name, 9, [], ["h"]) for name in "abcd"] == [["h"], ["h"], [], []]
    assert each.exchange("d", 9, [], ["h"]) == []
    assert each.exchange("a", 9, [], ["h"]) == []  # given back, and behind c and d
    assert each.exchange("d", 9, [], ["h"]) == []
    assert each.exchange("c", 9, [], ["h"]) == ["h"]
    assert each.exchange("b", 9, [], []) == []
    assert each.exchange("a", 9, [], ["h"]) == []
    assert each.exchange("d", 9, [], ["h"]) == ["h"]


def test_hosts_do_not_wait_for_each_other():
    each, _ = keeper(1)
    assert each.exchange("a", 9, [], ["h", "g"]) == ["h", "g"]
    assert each.exchange("b", 9, [], ["h", "i"]) == ["i"]
    assert each.exchange("a", 9, ["g"], []) == []
    assert each.exchange("b", 9, ["i"], ["h"]) == ["h"]


def test_a_worker_that_died_holds_a_host_no_longer_than_a_request_may_last():
    each, clock = keeper(1)
    assert each.exchange("dead", 9, [], ["h"]) == ["h"]
    assert each.exchange("dead too", 9, [], ["h"]) == []
    for clock[0] in (4.0, 9.0):
        assert each.exchange("b", 9, [], ["h"]) == []
    clock[0] = 9.1
    assert each.exchange("b", 9, [], ["h"]) == ["h"]


def test_a_lost_answer_costs_nothing():
    each, _ = keeper(1)
    assert each.exchange("a", 9, [], ["h"]) == ["h"]  # which never arrives
    assert each.exchange("a", 9, [], ["h"]) == ["h"]


def test_a_keeper_that_takes_over_lends_nothing_that_may_still_be_in_use():
    each, clock = keeper(1, restarted=True)
    assert each.exchange("a", 9, ["h"], ["g"]) == []
    clock[0] = 8.9
    assert each.exchange("b", 9, [], ["h", "g"]) == []
    assert each.exchange("a", 9, ["h"], []) == []
    clock[0] = 9.0
    assert each.exchange("b", 9, [], ["h", "g"]) == ["g"]


def at_once(ask: Callable[..., list[str]]) -> Callable[..., Awaitable[list[str]]]:
    async def asked(*words: object) -> list[str]:
        await asyncio.sleep(0)
        return ask(*words)

    return asked


@pytest.fixture
def _quick(monkeypatch):
    monkeypatch.setattr(turns, "GATHER", 0.0)
    monkeypatch.setattr(turns, "POLL", 0.001)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("places", [1, 2])
def test_workers_keep_to_the_turns_although_messages_are_lost(places):
    drawn, now, most = random.Random(places), Counter[str](), Counter[str]()
    kept = Keeper(places, restarted=lambda: False)

    def lossy(*words: object) -> list[str]:
        if drawn.random() < 0.2:
            raise OSError("lost on its way")
        answer = kept.exchange(*words)
        if drawn.random() < 0.2:
            raise OSError("lost on its way back")
        return answer

    async def row(worker: LentTurns, host: str) -> None:
        async with worker.at(host):
            now[host] += 1
            most[host] = max(most[host], now[host])
            for _ in range(drawn.randrange(4)):
                await asyncio.sleep(0)
            now[host] -= 1

    async def scenario():
        # What a lost message left behind would stay for so long.
        workers = [LentTurns(at_once(lossy), longest=1000.0) for _ in range(4)]
        rows = [row(worker, host) for worker in workers for host in "gh" * 15]
        async with asyncio.timeout(120):
            await asyncio.gather(*rows)
        for worker in workers:
            await worker.close()

    asyncio.run(scenario())
    assert 1 <= min(most["g"], most["h"]) <= max(most["g"], most["h"]) <= places


@pytest.mark.usefixtures("_quick")
def test_nothing_begins_on_what_the_keeper_could_have_lent_to_others(monkeypatch):
    clock, said, silent = [0.0], [], asyncio.Event()
    monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    kept = Keeper(1, clock=lambda: clock[0], restarted=lambda: False)

    def ask(*words: object) -> list[str]:
        said.append(words)
        if silent.is_set():
            raise OSError("not to be reached")
        return kept.exchange(*words)

    async def row(worker: LentTurns) -> None:
        async with worker.at("h"):
            pass

    async def scenario():
        worker, other = (LentTurns(at_once(each), 1.0) for each in (ask, kept.exchange))
        async with worker.at("h"):
            waiting = asyncio.create_task(row(worker))
            silent.set()
            clock[0] += turns.LEASE
        clock[0] += 1.1
        async with asyncio.timeout(60), other.at("h"):
            silent.clear()
            before = len(said)
            while len(said) < before + 5:
                await asyncio.sleep(0.001)
            assert not waiting.done()
        async with asyncio.timeout(60):
            await waiting
        await worker.close()
        await other.close()

    asyncio.run(scenario())


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("fault", ["gone", "TimeoutError"])
def test_a_keeper_that_stays_silent_is_waited_for_no_longer_than_patience_lasts(
    monkeypatch, fault
):
    monkeypatch.setattr(turns, "PATIENCE", 0.05)
    monkeypatch.setattr(turns, "LEASE", 0.01)

    async def ask(*words: object) -> list[str]:
        if fault == "TimeoutError":
            await asyncio.sleep(1000)
        raise OSError("gone")

    async def scenario():
        worker = LentTurns(ask, longest=1.0)
        for _ in range(2):
            with pytest.raises(ConnectionError, match=f"no turn at a host .* {fault}|'{fault}'"):
                async with asyncio.timeout(60), worker.at("h"):
                    pass
        await worker.close()

    asyncio.run(scenario())


# --- at a host --------------------------------------------------------------------------------


class Host:
    """Counts the connections that are open; each answer waits until so many were, once."""

    def __init__(self, meet: int = 1, seconds: float = 0.0) -> None:
        self.open = self.most = 0
        self.seconds = seconds
        self.asked: Counter[str] = Counter()
        self._meet, self._met = meet, asyncio.Event()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.most = max(self.most, self.open)
        if self.open >= self._meet:
            self._met.set()
        try:
            closing = False
            while not closing and (head := await reader.readuntil(b"\r\n\r\n")):
                closing = b"connection: close" in head.lower()
                path = head.split()[1].decode()
                self.asked[path] += 1
                await self._met.wait()
                await asyncio.sleep(self.seconds)
                body = RULES if path == "/robots.txt" else b"x"
                answer = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n"
                answer += "Connection: close\r\n" if closing else ""
                writer.write(answer.encode() + b"\r\n" + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()


async def fetched(base: str, workers: list[Downloader], rows: int) -> Counter[str]:
    """Every worker fetches as many rows of the host, and one that its rules disallow."""

    async def each(number: int, worker: Downloader) -> list[str]:
        urls = [f"{base}/{number}/{row}" for row in range(rows)] + [f"{base}/private"]
        return [download.reason async for download in worker.each(urls)]

    async with asyncio.timeout(120):
        found = await asyncio.gather(*(each(*pair) for pair in enumerate(workers)))
    for worker in workers:
        await worker.close()
    return Counter(reason for reasons in found for reason in reasons)


POLICY = DownloadPolicy(addresses=ADDRESSES, honour_robots=True, per_host=4)


@pytest.mark.parametrize(("workers", "share"), [(1, 4), (2, 2), (3, 1), (4, 1)])
def test_workers_that_are_no_more_than_the_turns_share_them_and_ask_nobody(
    monkeypatch, workers, share
):
    monkeypatch.setenv(turns.WORKERS, str(workers))

    async def scenario():
        host = Host(meet=workers * share)
        async with host.serving() as base:
            policy = replace(POLICY, honour_robots=False)
            crew = [Downloader(policy, turns_of_run(4, longest=15)) for _ in range(workers)]
            return await fetched(base, crew, rows=12), host

    found, host = asyncio.run(scenario())
    assert found == {"ok": 13 * workers}
    assert host.most == workers * share


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("places", [1, 2])
def test_more_workers_than_turns_take_turns_at_a_host(places):
    async def scenario():
        host, kept = Host(meet=places), Keeper(places, restarted=lambda: False)
        async with host.serving() as base:
            crew = [
                Downloader(POLICY, LentTurns(at_once(kept.exchange), longest=15))
                for _ in range(places + 2)
            ]
            return await fetched(base, crew, rows=20), host

    found, host = asyncio.run(scenario())
    assert found == {"ok": 20 * (places + 2), "robots": places + 2}
    assert host.asked["/robots.txt"] == places + 2  # and these were counted too
    assert host.most == places


# --- pauses that a host asks for --------------------------------------------------------------


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
