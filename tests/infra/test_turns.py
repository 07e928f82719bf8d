"""All workers of a run together connect to a host no more often than is polite."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from infra import turns
from infra.addresses import AddressPolicy
from infra.download import Downloader, DownloadPolicy
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
