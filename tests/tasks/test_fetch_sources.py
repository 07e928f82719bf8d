"""Folders and tars through the same stage as the web, and further passes over what failed."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import random
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from infra.download import Download, Downloader, DownloadPolicy
from infra.ledger import Ledger
from infra.runner import SystemicFailure
from infra.shards import TornShard, read_tar, sample_key, write_tar
from infra.sources import Source
from infra.store import Store
from tasks import fetch
from tasks.arrivals import from_tar
from tasks.fetch import FetchConfig, FetchWork, _Room, fetch_stage, make_plan
from tasks.pictures import PicturePolicy
from tasks.plans import WITNESSES, Plan, plan_retry

CONFIG = FetchConfig(pictures=PicturePolicy(size=64))


def jpeg(seed: int, side: int = 64) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def work(store: Store, **words: object) -> FetchWork:
    return FetchWork(store, CONFIG.pictures, DownloadPolicy(max_bytes=100_000, **words))


def fates(data) -> dict[str, str]:
    return {key: reason for key, reason, _ in data.statuses}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    (root / "b").mkdir(parents=True)
    (root / "a.jpg").write_bytes(jpeg(1))
    (root / "a.txt").write_text("first\npicture")
    (root / "b" / "c.jpg").write_bytes(jpeg(2))
    (root / "b" / "c.json").write_text(json.dumps({"caption": "second", "licence": "CC0"}))
    (root / "b" / "d.jpg").write_bytes(b"x" * 200_000)
    (root / "b" / "e.jpg").write_bytes(jpeg(3))
    (root / "b" / "e.json").write_text("[")
    (root / "b" / "f.bmp").write_bytes(b"BM")
    return root


def test_a_folder_of_pictures_is_ingested_with_captions_and_columns(folder, tmp_path):
    store = Store(str(tmp_path / "data"))
    plan = make_plan(store, str(folder), shard_rows=10)
    data = work(store).run(0)
    assert list(fates(data).values()) == ["ok", "ok", "too_large", "bad_row", "not_image"]
    captions = [text.decode() for _, text in read_tar(data.outputs["caption"])]
    assert captions == ["first picture", "second"]
    assert json.loads(data.columns["extra"][1].as_py())["licence"] == "CC0"
    arrived = [hashlib.sha256(body).hexdigest() for body in (jpeg(1), jpeg(2), b"BM")]
    assert data.columns["sha256"].to_pylist() == [*arrived[:2], None, None, arrived[2]]
    assert data.columns["stored_sha256"].to_pylist()[:2] == arrived[:2]
    assert make_plan(store, str(folder), shard_rows=10) == plan
    (folder / "g.jpg").write_bytes(jpeg(4))
    with pytest.raises(ValueError, match="a plan never changes"):
        make_plan(store, str(folder), shard_rows=10)


def test_a_list_cannot_name_files_only_a_folder_can(folder, tmp_path):
    (tmp_path / "l.tsv").write_text(f"file://{folder}/a.jpg\tx\n{folder}/a.jpg\ty\n")
    store = Store(str(tmp_path / "data"))
    make_plan(store, str(tmp_path / "l.tsv"), shard_rows=10)
    assert set(fates(work(store).run(0)).values()) == {"blocked_address"}


def test_tars_of_others_are_imported_without_a_download(tmp_path):
    members = [
        ("000.jpg", jpeg(1)), ("000.txt", b"\xef\xbb\xbfone"),
        ("000.json", b'{"caption": "no", "w": 3}'),
        ("001.txt", b"lost"),
        ("002.JPG", jpeg(2, 128)), ("002.json", b'{"caption": "two \\ud83d"}'),
        ("003.jpg", jpeg(1)), ("004.jpg", b"x" * 200_000),
    ]  # fmt: skip
    (tmp_path / "wds").mkdir()
    (tmp_path / "wds" / "00000.tar").write_bytes(write_tar(members))
    (tmp_path / "wds" / "00001.tar").write_bytes(write_tar(members)[:-2000])
    store = Store(str(tmp_path / "data"))
    plan = make_plan(store, str(tmp_path / "wds"), shard_rows=7)
    assert plan["num_shards"] == 2
    data = work(store).run(0)
    assert list(fates(data).values()) == ["ok", "bad_row", "ok", "duplicate", "too_large"]
    assert [text for _, text in read_tar(data.outputs["caption"])] == [b"one", b"two ?"]
    assert json.loads(data.columns["extra"][0].as_py())["__key__"] == "000"
    assert data.columns["width"].to_pylist() == [64, None, 128, 64, None]
    assert work(store).run(0).outputs == data.outputs
    with pytest.raises(TornShard, match=r"00001\.tar"):
        work(store).run(1)


@pytest.mark.parametrize("place", ["file", "memory"])
def test_tars_of_others_are_read_a_picture_at_a_time(tmp_path, place):
    pictures = [bytes([number]) * 1_000_000 for number in range(32)]
    members = [(f"{number:03}.jpg", data) for number, data in enumerate(pictures)]
    path = str(tmp_path / "a.tar") if place == "file" else f"memory://{tmp_path.name}/a.tar"
    with fsspec.open(path, "wb") as file:
        file.write(write_tar([*members, ("000.txt", b"a caption")]))
    del members
    tracemalloc.start()
    rows, arrivals = from_tar(path, 2_000_000)
    for download in arrivals:
        assert (download.reason, download.body) == ("ok", pictures[download.index])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [row["caption"] for row in rows] == ["a caption", *[""] * 31]
    assert peak < 16_000_000, "the tar has 32 MB"


class Web:
    """A stand-in for the network: URL to reason, "ok" with a picture of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fates: dict[str, str] = {}
        self.asked: list[str] = []
        monkeypatch.setattr(Downloader, "each", lambda _, urls: self.each(urls))

    async def each(self, urls):
        for index, url in enumerate(urls):
            self.asked.append(url)
            reason = self.fates.get(url, "ok")
            number = int(url.rpartition("/")[2])
            yield Download(index, reason, body=jpeg(number) if reason == "ok" else b"")


def planned(tmp_path: Path, rows: int, shard_rows: int) -> tuple[Store, list[str]]:
    urls = [f"http://h{i}.org/{i}" for i in range(rows)]
    (tmp_path / "l.csv").write_text("url,caption,id\n" + "".join(f"{u},c,{u}\n" for u in urls))
    store = Store(str(tmp_path / "data"))
    source = Source(path=str(tmp_path / "l.csv"), extra=("id",))
    make_plan(store, source, shard_rows=shard_rows)
    return store, urls


def run_all(store: Store) -> Ledger:
    ledger = Ledger(store)
    stage = fetch_stage(ledger.read_plan(), CONFIG)
    for shard in ledger.todo(stage, range(ledger.read_plan()["num_shards"])):
        ledger.commit(stage, shard, work(store).run(shard))
    return ledger


def test_shards_of_a_worker_overlap_while_one_waits_for_a_slow_server(tmp_path, monkeypatch):
    asked, later = [], threading.Event()

    async def persist(self, index, url):
        number = int(url.rpartition("/")[2])
        asked.append(number)
        while number == 0 and not later.is_set():
            await asyncio.sleep(0.01)
        if number == 5:
            later.set()  # the slow row of the first shard ends when the last of the second has
        return Download(index, "ok", body=jpeg(number))

    monkeypatch.setattr(Downloader, "_persist", persist)
    store, _ = planned(tmp_path, rows=6, shard_rows=3)
    worker = work(store, concurrency=2)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(worker.run, 0)
        while not asked:
            time.sleep(0.01)
        second = pool.submit(worker.run, 1)
        done = [unit.result(60) for unit in (first, second)]
    worker.close()
    assert [list(fates(data).values()) for data in done] == [["ok"] * 3] * 2
    assert all(1 < data.queues["shards"] <= 2 for data in done)
    assert asked == [0, 1, 2, 3, 4, 5]  # in the order of the shards


@pytest.mark.parametrize("slow", ["arrivals", "cleaning"])
def test_a_shard_tells_whether_it_waited_for_arrivals_or_for_cleaning(tmp_path, monkeypatch, slow):
    clean = fetch.cleaned

    async def persist(self, index, url):
        await asyncio.sleep(0.4 if slow == "arrivals" else 0)
        return Download(index, "ok", body=jpeg(index))

    def cleaned(*words):
        time.sleep(0.8 if slow == "cleaning" else 0)
        return clean(*words)

    monkeypatch.setattr(Downloader, "_persist", persist)
    monkeypatch.setattr(fetch, "cleaned", cleaned)
    store, _ = planned(tmp_path, rows=2, shard_rows=2)
    worker = work(store)
    data = worker.run(0)
    worker.close()
    assert data.waited.keys() == {"arrivals", "cleaning"}
    assert 0.1 < data.waited[slow] <= sum(data.waited.values()) <= data.seconds + 0.002
    assert slow == "arrivals" or data.queues["mb_to_clean"] > 0


def test_a_retry_takes_up_passing_failures_only_and_touches_nothing_that_is_done(
    tmp_path, monkeypatch
):
    store, urls = planned(tmp_path, 8, 4)
    web = Web(monkeypatch)
    web.fates = {urls[1]: "timeout", urls[2]: "not_found", urls[5]: "dns", urls[6]: "server_error"}
    stage = fetch_stage(Plan(store).about, CONFIG)
    with pytest.raises(ValueError, match="2 shards are not downloaded yet"):
        plan_retry(store, stage)
    before = run_all(store).commits(stage)
    with pytest.raises(ValueError, match="'not_found' cannot be mended"):
        plan_retry(store, stage, ["not_found"])
    assert plan_retry(store, stage, ["timeout", "server_error"])["rows"] == 2
    web.fates, web.asked = {urls[6]: "server_error"}, []
    ledger = run_all(store)
    assert web.asked == [urls[1], urls[6]]
    commits = ledger.commits(stage)
    assert {shard: commits[shard] for shard in before} == before
    assert fetch_stage(ledger.read_plan(), CONFIG).id == stage.id
    table = ledger.statuses(stage).to_pylist()[8:]
    assert [(row["key"], row["reason"], row["retry_of"]) for row in table] == [
        (sample_key(2, 0), "ok", sample_key(0, 1)),
        (sample_key(2, 1), "server_error", sample_key(1, 2)),
    ]
    assert json.loads(table[0]["extra"]) == {"id": urls[1]}
    assert plan_retry(store, stage)["rows"] == 1  # only what the last pass left, once
    web.fates = {}
    run_all(store)
    assert plan_retry(store, stage)["rows"] == 0
    assert ledger.read_plan()["num_shards"] == 4


def test_dead_hosts_of_a_retry_do_not_pass_for_a_dead_network_while_others_answer(
    tmp_path, monkeypatch
):
    store, urls = planned(tmp_path, 60, 60)
    web = Web(monkeypatch)
    web.fates = dict.fromkeys(urls[:30], "dns")
    stage = fetch_stage(Plan(store).about, CONFIG)
    run_all(store)
    plan_retry(store, stage)
    assert set(fates(work(store).run(1)).values()) == {"dns"}
    web.fates = dict.fromkeys(urls, "dns")
    with pytest.raises(SystemicFailure, match="30 of 30 rows"):
        work(store).run(1)


def test_a_shard_of_dead_hosts_does_not_stop_the_run_while_others_answer(tmp_path, monkeypatch):
    store, urls = planned(tmp_path, 90, 30)
    web = Web(monkeypatch)
    web.fates = dict.fromkeys(urls[30:60], "dns")
    worker = work(store)
    assert set(fates(worker.run(0)).values()) == {"ok"}
    assert set(fates(worker.run(1)).values()) == {"dns"}
    assert len(web.asked) == 60 + WITNESSES
    web.fates = dict.fromkeys(urls, "dns")
    with pytest.raises(SystemicFailure, match="30 of 30 rows"):
        worker.run(2)


def test_files_that_vanish_all_at_once_stop_the_run(tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    for i in range(30):
        (root / f"{i}.jpg").write_bytes(jpeg(i))
    store = Store(str(tmp_path / "data"))
    make_plan(store, str(root), shard_rows=100)
    root.rename(tmp_path / "away")
    with pytest.raises(SystemicFailure, match="30 of 30 rows"):
        work(store).run(0)


def test_a_row_that_repeats_the_url_of_a_bad_row_is_downloaded(tmp_path):
    rows = [{"url": "http://h/1", "caption": 5}, *2 * [{"url": "http://h/1", "caption": "\ud83d"}]]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    store = Store(str(tmp_path / "data"))
    make_plan(store, str(tmp_path / "list.jsonl"), shard_rows=10)
    bad, good, again = Plan(store).rows(0)
    assert bad["problem"]
    assert (good["problem"], good["duplicate_of"], good["caption"]) == (None, None, "?")
    assert again["duplicate_of"] == "00000000001"


def test_more_shards_than_keys_can_count_are_refused_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.plans.MAX_SHARDS", 3)
    (tmp_path / "list.tsv").write_text("".join(f"http://h/{i}\tc\n" for i in range(7)))
    store = Store(str(tmp_path / "data"))
    with pytest.raises(ValueError, match=r"7 rows are 4 shards of 2 rows, and .* at most 3"):
        make_plan(store, str(tmp_path / "list.tsv"), shard_rows=2)
    assert not store.list()
    assert make_plan(store, str(tmp_path / "list.tsv"), shard_rows=3)["num_shards"] == 3


def test_a_long_list_is_planned_in_buckets_with_the_same_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.repeated_urls._BUCKET_ROWS", 7)
    urls = [f"http://h.org/{i % 13}" for i in range(40)]
    (tmp_path / "l.tsv").write_text("".join(f"{url}\tc\n" for url in urls))
    store = Store(str(tmp_path / "data"))
    make_plan(store, str(tmp_path / "l.tsv"), shard_rows=9)
    rows = [row for shard in range(5) for row in Plan(store).rows(shard)]
    assert [row["url"] for row in rows] == urls
    expected = [None] * 13 + [sample_key(*divmod(i % 13, 9)) for i in range(13, 40)]
    assert [row["duplicate_of"] for row in rows] == expected


def test_planning_takes_the_same_memory_for_a_long_list_as_for_a_short_one(tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.repeated_urls._BUCKET_ROWS", 1000)
    peaks = []
    for rows in (3_000, 3_000, 24_000):  # the first warms up
        source = tmp_path / f"{rows}.tsv"
        source.write_text("".join(f"http://h.org/{i}\tcaption {i}\n" for i in range(rows)))
        store = Store(str(tmp_path / f"data-{len(peaks)}"))
        tracemalloc.start()
        make_plan(store, str(source), shard_rows=1000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.3 * peaks[1]


def test_bytes_that_wait_are_bounded_and_a_body_of_any_length_gets_its_turn():
    waiting: list[int] = []

    async def scenario() -> None:
        room, rng = _Room(100), random.Random(0)
        sizes = [rng.choice((1, 30, 99, 100, 500)) for _ in range(200)]

        async def occupy(size: int) -> None:
            await room.enter(size)
            waiting.append(size)
            assert sum(waiting) <= max(100, size)
            await asyncio.sleep(0)
            waiting.remove(size)
            room.leave(size)

        await asyncio.gather(*(occupy(size) for size in sizes))
        await asyncio.wait_for(room.enter(100), 60)  # all of it is free again

    asyncio.run(scenario())
    assert not waiting
