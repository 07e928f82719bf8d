"""Ingestion: planned rows become ``rgb`` and ``caption`` shards, and a fate for every row.

One unit gets its rows' pictures concurrently, cleans them in a thread while others are under way,
and writes two tars with the same keys in plan order. The status table keeps, for every row, its
fate, URL and further columns, and of what arrived the hashes and the original size. Units of a
worker overlap: while one waits for its last, slow servers, the next is under way.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator, Container, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import uvloop

from infra.addresses import AddressPolicy
from infra.download import NETWORK, Download, Downloader, DownloadPolicy
from infra.ledger import OK, ShardData, Stage
from infra.overlap import Waits
from infra.runner import StageJob, SystemicFailure
from infra.shards import sample_key, shard_name, write_tar
from infra.stages import SHARDS
from infra.store import Store
from infra.turns import pauses_of_run, turns_of_run
from models import modalities
from tasks.arrivals import UNREADABLE, from_files, from_tar
from tasks.pictures import BadPicture, Picture, PicturePolicy, cleaned
from tasks.plans import MAX_CAPTION, WITHDRAWN, WITNESSES, Plan, make_plan

__all__ = ["FetchConfig", "FetchWork", "fetch_job", "fetch_stage", "make_plan"]

logger = logging.getLogger("fourm.fetch")

SYSTEMIC_SHARE = 0.9
"""A shard of which this share fails by the network is not the web's fault: the run stops."""
SYSTEMIC_MIN_ROWS = 20

UNITS_AT_ONCE = 4
"""Shards of a worker that overlap: the slowest servers take as long as a few shards."""
WAITING = 192_000_000
"""Bytes of a worker's pictures that wait for being cleaned: some thousand photographs. So many
seconds of work are left when the last row is asked for, and pass while slow servers answer: about
ten, the time after which silent ones are given up."""
RESOLVERS = 64
"""Threads that ask the name server: dead names take seconds each, and are many."""
GARBAGE = 20_000
"""New objects after which a worker looks for garbage: a hundred downloads make so many."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How the planned rows are downloaded and cleaned."""

    pictures: PicturePolicy = field(default_factory=PicturePolicy)
    downloads: DownloadPolicy = field(default_factory=DownloadPolicy)


def fetch_stage(plan: dict, config: FetchConfig) -> Stage:
    """The stage of these rows under this policy."""
    params = {
        "plan": plan["id"],
        "pictures": asdict(config.pictures),
        "max_bytes": config.downloads.max_bytes,
        "honour_opt_out": config.downloads.honour_opt_out,
    }
    if config.downloads.honour_robots:
        params["honour_robots"] = True  # absent otherwise: sets of before keep their stage
    return Stage(name="fetch", version=3, params=params, outputs=("rgb", "caption"))


def fetch_job(plan: dict, config: FetchConfig) -> StageJob:
    """All planned shards as work for the stage runner."""
    downloads = asdict(config.downloads)
    downloads["addresses"] = sorted(config.downloads.addresses.allow_hosts)
    return StageJob(
        stage=fetch_stage(plan, config),
        factory="tasks.fetch:build_work",
        config={"pictures": asdict(config.pictures), "downloads": downloads},
        shards=tuple(range(plan["num_shards"])),
        at_once=UNITS_AT_ONCE,
        turns=0 if plan.get("format") in ("folder", "webdataset") else config.downloads.per_host,
    )


def build_work(store_url: str, stage: Stage, config: dict) -> FetchWork:
    """The worker's side of :func:`fetch_job`."""
    import torch  # noqa: F401 - or the first pictures of each thread would wait for it

    # What is loaded by now stays: the collector, which many small objects of downloads keep busy,
    # need not walk through it each time, and comes when most of them are gone by themselves.
    gc.freeze()
    gc.set_threshold(GARBAGE)
    downloads = dict(config["downloads"])
    downloads["addresses"] = AddressPolicy(frozenset(downloads["addresses"]))
    return FetchWork(
        Store(store_url), PicturePolicy(**config["pictures"]), DownloadPolicy(**downloads)
    )


class _Room:
    """A number of bytes that several may fill; who would not fit into an empty one gets it all."""

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._turn = asyncio.Lock()
        self._left = asyncio.Event()

    async def enter(self, size: int) -> None:
        """Waits until there are so many bytes, then takes them; in the order of arrival."""
        async with self._turn:
            while self._free < min(size, self._size):
                self._left.clear()
                await self._left.wait()
            self._free -= size

    def leave(self, size: int) -> None:
        """Gives them back."""
        self._free += size
        self._left.set()


@dataclass
class _Shard:
    """The rows of a shard and what has become of them so far."""

    number: int
    rows: list[dict[str, Any]]
    fates: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Row to (reason, detail); a row without one is fine."""
    hashes: dict[int, str] = field(default_factory=dict)
    """Row to the sha256 of what arrived, also where it was no good."""
    pictures: dict[int, Picture] = field(default_factory=dict)
    waited: dict[str, float] = field(default_factory=dict)
    """Seconds, for "arrivals" and for "cleaning"."""
    queues: dict[str, float] = field(default_factory=dict)
    """Of the worker on average meanwhile, its other shards included."""

    def key(self, row: int) -> str:
        return sample_key(self.number, row)


class FetchWork:
    """Gets and cleans the pictures of shards of the plan; several threads may `run` at once.

    Downloads of all shards share an event loop in a thread of its own, and with it connections,
    answers of the name server, and turns at hosts.
    """

    def __init__(self, store: Store, pictures: PicturePolicy, downloads: DownloadPolicy) -> None:
        self._plan = Plan(store)
        self._pictures = pictures
        self._downloads = downloads
        self._answered: dict[str, str] = {}
        # A worker has one core; a second thread would only make the two wait for the interpreter.
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="clean")
        # Bodies that wait for a thread occupy memory: when they are many, no more are taken.
        self._room = _Room(WAITING)
        self._loop = uvloop.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(RESOLVERS, thread_name_prefix="resolve"))
        self._thread = threading.Thread(target=self._loop.run_forever, name="fetch", daemon=True)
        self._thread.start()
        self._downloader = self._wait(self._open())

    def close(self) -> None:
        """Ends the threads and the connections; what is under way is abandoned."""
        if sys.is_finalizing() or self._loop.is_closed():
            return  # threads of a dying interpreter answer no more
        self._wait(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._threads.shutdown(cancel_futures=True)

    async def _open(self) -> Downloader:
        limits = self._downloads
        turns = turns_of_run(limits.per_host, longest=limits.timeout)
        return Downloader(limits, turns, pauses_of_run())

    async def _shut(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._downloader.close()

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine in the loop; an interrupt here cancels it there."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def run(self, shard: int) -> ShardData:
        """Fetches one shard.

        Raises:
            SystemicFailure: when nearly every row fails by the network, or no file can be read.
        """
        started = time.monotonic()
        state = _Shard(shard, self._plan.rows(shard))
        self._wait(self._counted(state))
        _drop_repeated_bytes(state)
        return _shard_data(state, time.monotonic() - started)

    async def _counted(self, state: _Shard) -> None:
        depths = self._downloader.depths
        mark = depths.mark()
        with depths.at(SHARDS):
            await self._fetch(state)
        state.queues = depths.since(mark)

    async def _fetch(self, state: _Shard) -> None:
        began, waits = time.monotonic(), Waits()
        arrivals = self._arrivals(state)
        wanted = [row for row in range(len(state.rows)) if row not in state.fates]
        settling = []
        async for download in arrivals:
            row = wanted[download.index]
            if download.reason == OK:
                self._remember(state.rows[row]["url"])
                with waits.on("cleaning"):
                    await self._room.enter(len(download.body))
                settling.append(asyncio.create_task(self._settle(state, row, download.body)))
            else:
                state.fates[row] = (download.reason, download.detail)
        with waits.on("cleaning"):
            await asyncio.gather(*settling)
        waits.seconds["arrivals"] = time.monotonic() - began - waits.seconds["cleaning"]
        state.waited = waits.record()
        await self._stop_if_systemic(state, wanted)

    def _arrivals(self, state: _Shard) -> AsyncIterator[Download]:
        """What comes in for the rows that are wanted; all others get their fate at once."""
        limit = self._downloads.max_bytes
        if self._plan.format == "webdataset":
            state.rows, arrived = from_tar(state.rows[0]["url"], limit)
            return _each(_wanted(state, arrived, self._plan.withdrawn()))
        for number, row in enumerate(state.rows):
            if row["problem"]:
                state.fates[number] = ("bad_row", row["problem"])
            elif row["duplicate_of"]:
                state.fates[number] = ("duplicate", f"of {row['duplicate_of']}")
        wanted = [row for row in range(len(state.rows)) if row not in state.fates]
        if self._plan.format == "folder":
            return from_files(str(self._plan.about["source"]), state.rows, wanted, limit)
        return self._downloader.each([state.rows[row]["url"] for row in wanted])

    async def _settle(self, state: _Shard, row: int, body: bytes) -> None:
        try:
            state.hashes[row] = hashlib.sha256(body).hexdigest()
            with self._downloader.depths.at("mb_to_clean", len(body) / 1e6):
                state.pictures[row] = await self._loop.run_in_executor(
                    self._threads, cleaned, body, self._pictures
                )
        except BadPicture as error:
            state.fates[row] = (error.reason, str(error))
        finally:
            self._room.leave(len(body))

    async def _stop_if_systemic(self, state: _Shard, wanted: list[int]) -> None:
        reasons = [state.fates.get(row, (OK, ""))[0] for row in wanted]
        failed = sum(reason in NETWORK or reason == UNREADABLE for reason in reasons)
        if len(reasons) < SYSTEMIC_MIN_ROWS or failed < SYSTEMIC_SHARE * len(reasons):
            return
        if await self._somebody_answers(state.number):
            return
        raise SystemicFailure(
            f"{failed} of {len(reasons)} rows of {shard_name(state.number)} failed by the network "
            "(DNS, connection or time-out, or files that cannot be read): check this machine's "
            "network, then run again; nothing of this shard was recorded"
        )

    async def _somebody_answers(self, shard: int) -> bool:
        """Whether URLs that once worked do: in a pass over failed rows nearly all may be dead, and
        of a list that is sorted all rows of a shard may name one dead host."""
        again = self._plan.retry_of(shard)
        witnesses = [*(again["witnesses"] if again else ()), *self._answered.values()]
        arrivals = [download.reason async for download in self._downloader.each(witnesses)]
        return any(reason not in NETWORK for reason in arrivals)

    def _remember(self, url: str) -> None:
        """The last URLs that worked, of different hosts; there are none of files."""
        host = url.partition("://")[2].partition("/")[0]
        if self._plan.format in ("folder", "webdataset") or not host:
            return
        self._answered.pop(host, None)
        self._answered[host] = url
        if len(self._answered) > WITNESSES:
            del self._answered[next(iter(self._answered))]


def _wanted(
    state: _Shard, downloads: Iterable[Download], gone: Container[str]
) -> Iterator[Download]:
    """What a tar holds, but for samples that had to go, which it may still have: of these nothing
    is told."""
    for found in downloads:
        if state.key(found.index) in gone:
            state.rows[found.index] = {"url": "", "caption": ""}
            found = Download(found.index, WITHDRAWN)
        yield found


async def _each(downloads: Iterable[Download]) -> AsyncIterator[Download]:
    for download in downloads:
        yield download


def _drop_repeated_bytes(state: _Shard) -> None:
    """Of pictures with equal bytes in a shard the first in plan order stays."""
    first: dict[str, int] = {}
    for row in sorted(state.pictures):
        earlier = first.setdefault(state.pictures[row].sha256, row)
        if earlier != row:
            state.fates[row] = ("duplicate", f"of {state.key(earlier)}, byte for byte")


def _shard_data(state: _Shard, seconds: float) -> ShardData:
    kept = [row for row in sorted(state.pictures) if row not in state.fates]
    caption = modalities.get("caption")
    texts = {row: " ".join(state.rows[row]["caption"].split())[:MAX_CAPTION] for row in kept}
    pictures = write_tar((f"{state.key(row)}.jpg", state.pictures[row].data) for row in kept)
    captions = write_tar(
        (f"{state.key(row)}.{caption.ext}", caption.encode(texts[row])) for row in kept
    )
    every = range(len(state.rows))
    return ShardData(
        keys=[state.key(row) for row in kept],
        outputs={"rgb": pictures, "caption": captions},
        statuses=[(state.key(row), *state.fates.get(row, (OK, ""))) for row in every],
        seconds=seconds,
        columns=_columns(state),
        waited=state.waited,
        queues=state.queues,
    )


def _columns(state: _Shard) -> dict[str, pa.Array]:
    """What the status table tells of every row; null where it is unknown."""
    every = range(len(state.rows))
    found = [state.pictures.get(row) for row in every]
    texts = {
        name: pa.array([row.get(name) or None for row in state.rows], pa.string())
        for name in ("url", "extra", "retry_of")
    }
    return {
        **texts,
        "sha256": pa.array([state.hashes.get(row) for row in every], pa.string()),
        "stored_sha256": pa.array([p and p.sha256 for p in found], pa.string()),
        "dhash": pa.array([p and p.dhash for p in found], pa.uint64()),
        "width": pa.array([p and p.width for p in found], pa.int32()),
        "height": pa.array([p and p.height for p in found], pa.int32()),
    }
