"""robots.txt: what a host allows is fetched, and nothing else, where that was asked for."""

import asyncio
import random
from collections import Counter

import pytest
from aiohttp import web
from yarl import URL

from infra import robots
from infra.addresses import AddressPolicy
from infra.download import Downloader, DownloadPolicy
from infra.robots import Answer, Refusal, Robots

RULES = b"""
User-agent: *
Disallow: /

User-agent: fourm
Disallow: /private/
Disallow: /*.gif$
Allow: /private/but-this
"""


class Site:
    """A host that answers every path with a byte, and whose rules are as given."""

    def __init__(
        self, rules: bytes | int, headers: dict[str, str] | None = None, broken: int = 0
    ) -> None:
        self._rules, self._headers, self._broken = rules, headers, broken
        self.asked: Counter[str] = Counter()

    async def __aenter__(self) -> "Site":
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.base = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        self.asked[request.path] += 1
        if request.path == "/elsewhere":
            raise web.HTTPFound("/private/a.jpg")
        if request.path != "/robots.txt":
            return web.Response(body=b"x")
        if isinstance(self._rules, int):
            return web.Response(status=self._rules)
        if self.asked[request.path] <= self._broken:
            return web.Response(status=503)
        return web.Response(body=self._rules, headers=self._headers)


async def fates(urls: list[str], **policy) -> list[str]:
    addresses = AddressPolicy(frozenset({"127.0.0.1"}))
    downloader = Downloader(DownloadPolicy(addresses=addresses, backoff=0.01, **policy))
    found = {each.index: each.reason async for each in downloader.each(urls)}
    await downloader.close()
    return [found[index] for index in range(len(urls))]


PATHS = {
    "/a.jpg": "ok", "/private/a.jpg": "robots", "/private/but-this": "ok", "/a.gif": "robots",
    "/a.gif?size=1": "ok", "/elsewhere": "robots",
}  # fmt: skip


@pytest.mark.parametrize("headers", [None, {"X-Robots-Tag": "noindex"}])
def test_a_host_is_asked_once_and_only_what_its_rules_allow_is_fetched(headers):
    async def scenario():
        async with Site(RULES, headers) as site:
            urls = [site.base + path for path in PATHS] * 3
            assert await fates(urls, honour_robots=True) == [*PATHS.values()] * 3
            return site.asked

    asked = asyncio.run(scenario())
    assert asked["/robots.txt"] == 1
    assert not asked["/private/a.jpg"]


def test_rules_are_not_asked_for_unless_wanted():
    async def scenario():
        async with Site(RULES) as site:
            assert await fates([site.base + path for path in PATHS]) == ["ok"] * len(PATHS)
            return site.asked

    assert not asyncio.run(scenario())["/robots.txt"]


@pytest.mark.parametrize(
    ("status", "fate"), [(404, "ok"), (403, "ok"), (503, "server_error"), (429, "rate_limited")]
)
def test_no_rules_allow_everything_and_a_host_that_cannot_say_is_left_to_a_later_pass(status, fate):
    async def scenario():
        async with Site(status) as site:
            found = await fates([site.base + "/a.jpg"], honour_robots=True, attempts=1)
            return found, site.asked["/a.jpg"]

    assert asyncio.run(scenario()) == ([fate], int(fate == "ok"))


def test_a_host_that_could_not_say_for_a_moment_is_asked_again():
    async def scenario():
        async with Site(RULES, broken=1) as site:
            paths = ["/a.jpg", "/private/a.jpg"]
            found = await fates([site.base + path for path in paths], honour_robots=True)
            return found, site.asked["/robots.txt"]

    assert asyncio.run(scenario()) == (["ok", "robots"], 2)


def test_a_host_that_is_not_there_ends_as_it_does_without_rules():
    urls = ["http://127.0.0.1:9/a.jpg"] * 2
    assert asyncio.run(fates(urls, honour_robots=True, attempts=1)) == ["connect"] * 2


def test_whoever_stops_waiting_for_the_rules_takes_them_from_nobody():
    async def scenario():
        go = asyncio.Event()

        async def ask(url: URL) -> Answer:
            await go.wait()
            return RULES

        rules = Robots(ask)
        first, second = (
            asyncio.create_task(rules.refusal(URL("http://a.org/private/x"))) for _ in range(2)
        )
        await asyncio.sleep(0)
        first.cancel()
        go.set()
        return await second

    refusal = asyncio.run(scenario())
    assert refusal is not None
    assert refusal.reason == "robots"
    assert "a.org disallows /private/x" in refusal.detail


def test_what_is_remembered_of_rules_is_bounded(monkeypatch):
    monkeypatch.setattr(robots, "MAX_BYTES", 10 * len(RULES))
    monkeypatch.setattr(robots, "MAX_ORIGINS", 20)
    asked: Counter[str] = Counter()

    async def ask(url: URL) -> Answer:
        asked[url.host or ""] += 1
        return RULES if int((url.host or "").split(".")[0]) % 2 else None

    async def scenario():
        rules = Robots(ask)
        drawn = random.Random(0)
        for _ in range(300):
            await rules.refusal(URL(f"http://{drawn.randrange(60)}.org/x"))
            assert len(rules._rules) <= 20
            assert rules._bytes <= 11 * len(RULES)
            assert rules._bytes == sum(rules._sizes.values())
        again = asked["59.org"]
        await rules.refusal(URL("http://59.org/x"))
        await rules.refusal(URL("http://59.org/y"))
        return asked["59.org"] - again

    assert asyncio.run(scenario()) <= 1


@pytest.mark.parametrize(("passing", "asked"), [(True, 2), (False, 1)])
def test_a_refusal_holds_for_all_that_wait_and_for_later_ones_if_it_lasts(passing, asked):
    refusal, times = Refusal("dns", "gone", passing), []

    async def ask(url: URL) -> Answer:
        times.append(url)
        return refusal

    async def scenario():
        rules = Robots(ask)
        urls = [URL(f"http://a.org/{i}") for i in range(5)]
        found = await asyncio.gather(*(rules.refusal(url) for url in urls))
        return [*found, await rules.refusal(urls[0])]

    assert asyncio.run(scenario()) == [refusal] * 6
    assert len(times) == asked
