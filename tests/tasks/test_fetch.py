"""Ingestion against a hostile local web: every row gets a fate, good rows get their bytes."""

import asyncio
import hashlib
import io
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from aiohttp import web
from PIL import Image

from infra.addresses import AddressPolicy
from infra.download import Download, Downloader, DownloadPolicy
from infra.ledger import Ledger
from infra.runner import SystemicFailure
from infra.shards import read_tar, sample_key
from infra.store import Store
from tasks.fetch import FetchConfig, FetchWork, fetch_stage, make_plan
from tasks.pictures import PicturePolicy


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


class HostileWeb:
    """Answers by path; counts how often each was asked."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.port = self.now = self.most = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        kind, name = request.match_info["kind"], request.match_info["name"]
        self.asked[request.path] += 1
        self.agents.add(request.headers["User-Agent"])
        if kind == "img":
            return web.Response(body=jpeg(int(name)), content_type="image/jpeg")
        if kind == "flaky" and self.asked[request.path] > 1:
            return web.Response(body=jpeg(int(name)))
        if kind == "flaky":
            raise web.HTTPServiceUnavailable(headers={"Retry-After": "0"})
        if kind == "status":
            return web.Response(status=int(name))
        if kind == "html":
            return web.Response(text="<html></html>")
        if kind == "redirect":
            targets = {"private": "http://10.0.0.1/a.jpg", "file": "file:///etc/passwd",
                       "loop": request.path, "good": "/img/77"}  # fmt: skip
            raise web.HTTPFound(targets[name])
        if kind in ("crowd", "detour"):
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.05)
            self.now -= 1
            if kind == "detour":
                raise web.HTTPFound(f"/crowd/{name}")
            return web.Response(body=jpeg(int(name)))
        if kind == "later":
            date = "Wed, 21 Oct 99999999999 07:28:00 GMT"
            raise web.HTTPServiceUnavailable(headers={"Retry-After": date})
        if kind == "optout":
            words = {"x": "noai", "y": "max-snippet:-1, noai"}[name]
            return web.Response(body=jpeg(1), headers={"X-Robots-Tag": words})
        return await self._stream(request, kind)

    async def _stream(self, request: web.Request, kind: str) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(64 if kind == "endless" else 3):
            await response.write(b"\xff" * (1 << 14))
            if kind == "drip":
                await asyncio.sleep(2)
        return response


@pytest.fixture(scope="module")
def hostile() -> Iterator[HostileWeb]:
    site, loop, ready = HostileWeb(), asyncio.new_event_loop(), threading.Event()

    app = web.Application()
    app.router.add_get("/{kind}/{name}", site.answer)
    runner = web.AppRunner(app, shutdown_timeout=0)

    async def start() -> None:
        await runner.setup()
        tcp = web.TCPSite(runner, "127.0.0.1", 0)
        await tcp.start()
        site.port = runner.addresses[0][1]
        ready.set()

    loop.create_task(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    assert ready.wait(120)
    yield site
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)


def config(port: int, timeout: float = 60.0) -> FetchConfig:
    allowed = AddressPolicy(frozenset({f"127.0.0.1:{port}"}))
    downloads = DownloadPolicy(
        timeout=timeout, max_bytes=200_000, backoff=0.01, addresses=allowed
    )
    return FetchConfig(pictures=PicturePolicy(size=64), downloads=downloads)


def ingest(root, lines: list[str], settings: FetchConfig, shard: int = 0):
    source = root / "list.tsv"
    source.write_text("\n".join(lines))
    store = Store(str(root / "data"))
    plan = make_plan(store, str(source), shard_rows=100)
    with closing(FetchWork(store, settings.pictures, settings.downloads)) as work:
        return Ledger(store), fetch_stage(plan, settings), work.run(shard)


FATES = [
    ("/img/1", "ok"),
    ("/flaky/2", "ok"),
    ("/redirect/good", "ok"),
    ("/img/1", "duplicate"),
    ("/status/404", "not_found"),
    ("/status/410", "not_found"),
    ("/status/403", "forbidden"),
    ("/status/500", "server_error"),
    ("/status/429", "rate_limited"),
    ("/html/x", "not_image"),
    ("/redirect/private", "blocked_address"),
    ("/redirect/file", "blocked_address"),
    ("/redirect/loop", "too_many_redirects"),
    ("/later/x", "server_error"),
    ("/optout/x", "opt_out"),
    ("/optout/y", "opt_out"),
    ("/endless/x", "too_large"),
]
ELSEWHERE = [
    ("http://169.254.169.254/latest/meta-data", "blocked_address"),
    ("http://0x7f.1/a.jpg", "blocked_address"),
    ("http://2130706433/a.jpg", "blocked_address"),
    ("file:///etc/passwd", "blocked_address"),
    ("not a url", "blocked_address"),
    ("http://[bad/", "bad_url"),
]


def test_every_row_gets_its_fate_and_good_rows_their_bytes(hostile, tmp_path):
    base = f"http://127.0.0.1:{hostile.port}"
    rows = [(base + path, fate) for path, fate in FATES] + ELSEWHERE
    lines = [f"{url}\tcaption {i}" for i, (url, _) in enumerate(rows)]
    ledger, stage, data = ingest(tmp_path, lines, config(hostile.port))
    fates = {key: reason for key, reason, _ in data.statuses}
    assert fates == {sample_key(0, i): fate for i, (_, fate) in enumerate(rows)}
    pictures = dict(read_tar(data.outputs["rgb"]))
    assert pictures[f"{data.keys[0]}.jpg"] == jpeg(1)
    captions = dict(read_tar(data.outputs["caption"]))
    assert captions[f"{data.keys[1]}.txt"] == b"caption 1"
    assert ledger.commit(stage, 0, data).samples == 3
    assert hostile.asked["/status/404"] == 1  # what no retry can mend is not retried
    assert hostile.asked["/status/500"] == 3
    assert all(agent.startswith("fourm ") for agent in hostile.agents)


def test_a_body_that_drips_runs_out_of_time(hostile, tmp_path):
    lines = [f"http://127.0.0.1:{hostile.port}/drip/x\tx"]
    _, _, data = ingest(tmp_path, lines, config(hostile.port, timeout=0.5))
    assert [reason for _, reason, _ in data.statuses] == ["timeout"]
    assert hostile.asked["/drip/x"] <= 3


def test_a_host_is_asked_for_no_more_at_once_than_is_polite(hostile, tmp_path):
    base, settings = f"http://127.0.0.1:{hostile.port}", config(hostile.port)
    settings = replace(settings, downloads=replace(settings.downloads, per_host=2))
    hostile.most = 0
    lines = [f"{base}/{kind}/{100 + i}\tc" for i in range(6) for kind in ("crowd", "detour")]
    _, _, data = ingest(tmp_path, [*lines, f"{base}/crowd/1\tc"], settings)
    assert len(data.keys) == 7  # a detour ends at the picture that was there already
    assert 1 <= hostile.most <= 2


def test_a_shard_tells_how_many_requests_were_under_way_and_how_many_rows_waited_at_hosts(
    hostile, tmp_path
):
    base, settings = f"http://127.0.0.1:{hostile.port}", config(hostile.port)
    settings = replace(settings, downloads=replace(settings.downloads, per_host=1))
    _, _, data = ingest(tmp_path, [f"{base}/crowd/{i}\tc" for i in range(4)], settings)
    assert data.queues.keys() == {"shards", "at_hosts", "requests", "mb_to_clean"}
    assert 0 < data.queues["requests"] <= 1
    assert data.queues["at_hosts"] > 0


@pytest.mark.parametrize(
    ("asked_for", "least"), [(None, [1, 2, 4]), (3.0, [3, 3, 4]), (30.0, []), (1e9, [])]
)
def test_pauses_double_and_last_as_long_as_the_server_asks_or_leave_it_to_a_later_pass(
    monkeypatch, asked_for, least
):
    pauses: list[float] = []

    async def attempt(self, index, url):
        return Download(index, "rate_limited", retry_after=asked_for)

    async def sleep(seconds):
        pauses.append(seconds)

    async def persist():
        downloader = Downloader(DownloadPolicy(attempts=4, backoff=2, timeout=20))
        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "sleep", sleep)
            found = await downloader._persist(0, "http://example.org/")
        await downloader.close()
        return found

    monkeypatch.setattr(Downloader, "_attempt", attempt)
    assert asyncio.run(persist()).reason == "rate_limited"
    assert len(pauses) == len(least)
    assert all(a >= b for a, b in zip(pauses, least, strict=True))


def test_no_more_bodies_are_fetched_than_are_taken_and_leaving_early_frees_the_slots(monkeypatch):
    begun: list[int] = []

    async def persist(self, index, url):
        begun.append(index)
        return Download(index, "ok", body=b"x")

    async def take():
        downloader = Downloader(DownloadPolicy(concurrency=3))
        urls = ["http://example.org/"] * 9
        slow = downloader.each(urls)
        await anext(slow)
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(begun) <= 4
        await slow.aclose()
        found = [download.index async for download in downloader.each(urls)]
        await downloader.close()
        return found

    monkeypatch.setattr(Downloader, "_persist", persist)
    assert sorted(asyncio.run(take())) == list(range(9))


def test_proxies_of_the_environment_are_never_asked(hostile, tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    lines = [f"http://127.0.0.1:{hostile.port}/img/1\tx"]
    _, _, data = ingest(tmp_path, lines, config(hostile.port))
    assert [reason for _, reason, _ in data.statuses] == ["ok"]


def test_fetching_the_same_rows_again_gives_the_same_bytes(hostile, tmp_path):
    lines = [f"http://127.0.0.1:{hostile.port}/img/{i}\tc" for i in range(40)]
    _, _, first = ingest(tmp_path, lines, config(hostile.port))
    _, _, second = ingest(tmp_path, lines, config(hostile.port))
    assert first.outputs == second.outputs
    assert first.keys == sorted(first.keys)


def test_equal_pictures_under_different_urls_are_marked_as_duplicates(hostile, tmp_path):
    lines = [f"http://127.0.0.1:{hostile.port}/img/5?copy={i}\tc" for i in range(3)]
    _, _, data = ingest(tmp_path, lines, config(hostile.port))
    assert [reason for _, reason, _ in data.statuses] == ["ok", "duplicate", "duplicate"]


def test_a_network_that_is_down_stops_the_run_instead_of_marking_rows_done(tmp_path):
    lines = [f"http://127.0.0.1:9/{i}.jpg\tc" for i in range(30)]
    with pytest.raises(SystemicFailure, match="30 of 30 rows"):
        ingest(tmp_path, lines, config(9))


def test_a_plan_never_changes_and_planning_again_is_free(tmp_path):
    source = tmp_path / "list.tsv"
    source.write_text("".join(f"http://example.org/{i}.jpg\tc {i}\n" for i in range(25)))
    store = Store(str(tmp_path / "data"))
    plan = make_plan(store, str(source), shard_rows=10)
    assert (plan["rows"], plan["num_shards"]) == (25, 3)
    assert make_plan(store, str(source), shard_rows=10) == plan
    with pytest.raises(ValueError, match="a plan never changes"):
        make_plan(store, str(source), shard_rows=5)


def test_the_identity_of_a_plain_list_is_the_digest_of_its_lines(tmp_path):
    source, lines = tmp_path / "list.tsv", ["http://a.org/1\tone  \t x", "bare", "\tno url"]
    source.write_text("\r\n\n".join(lines))
    plan = make_plan(Store(str(tmp_path / "data")), str(source), shard_rows=10)
    whole = b"10:None:" + "".join(f"{line}\n" for line in lines).encode()
    assert plan["id"] == hashlib.sha256(whole).hexdigest()
    assert set(plan) >= {"id", "source", "rows", "shard_rows", "num_shards"}


def test_an_empty_list_is_refused(tmp_path):
    source = tmp_path / "list.tsv"
    source.write_text("\n\n")
    with pytest.raises(ValueError, match="holds no rows"):
        make_plan(Store(str(tmp_path / "data")), str(source), shard_rows=10)
