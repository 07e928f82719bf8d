"""Ingestion: rows of a URL list become ``rgb`` and ``caption`` shards, and a fate for every row.

The plan cuts the list into immutable row ranges, so a row's key depends on its place in the list
alone, whatever else was downloaded. One unit downloads its rows concurrently, cleans the pictures
in threads while other downloads go on, and writes two tars with the same keys in plan order.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from infra.addresses import AddressPolicy
from infra.download import NETWORK, Download, DownloadPolicy, download_all
from infra.ledger import Ledger, ShardData, Stage
from infra.runner import StageJob, SystemicFailure
from infra.shards import sample_key, shard_name, write_tar
from infra.store import Store
from models import modalities
from tasks.pictures import BadPicture, PicturePolicy, clean

logger = logging.getLogger("fourm.fetch")

SYSTEMIC_SHARE = 0.9
"""A shard of which this share fails by the network is not the web's fault: the run stops."""
SYSTEMIC_MIN_ROWS = 20
MAX_CAPTION = 4000
"""Longest alt text that is kept, in characters."""
_ROWS = pa.schema([("url", pa.string()), ("caption", pa.string()), ("duplicate_of", pa.string())])


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How the planned rows are downloaded and cleaned."""

    pictures: PicturePolicy = field(default_factory=PicturePolicy)
    downloads: DownloadPolicy = field(default_factory=DownloadPolicy)


def make_plan(store: Store, source: str, *, shard_rows: int, limit: int | None = None) -> dict:
    """Cuts a TSV (``url<TAB>caption``, local or any fsspec URL) into shards of rows, once.

    Planning the same list again returns the plan that stands. A row whose URL stood earlier in
    the list is planned as a duplicate and never downloaded.

    Raises:
        ValueError: when the list is empty, or another list was planned in this dataset.
    """
    if shard_rows < 1 or shard_rows > 99_999:
        raise ValueError(f"shard_rows must be 1 to 99999, got {shard_rows}")
    ledger = Ledger(store)
    identity = _identity(source, shard_rows, limit)
    if store.exists("plan/plan.json"):
        plan = ledger.read_plan()
        if plan["id"] != identity:
            raise ValueError(
                f"{store.url} was planned from {plan['source']} and a plan never changes: "
                f"choose another root for {source}"
            )
        return plan
    rows = 0
    num_shards = 0
    for shard, batch in enumerate(_planned(source, shard_rows, limit)):
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(batch, schema=_ROWS), buffer)
        store.write(f"plan/rows/{shard_name(shard)}.parquet", buffer.getvalue())
        rows += len(batch)
        num_shards = shard + 1
    if not rows:
        raise ValueError(f"{source} holds no rows: expected lines of the form url<TAB>caption")
    plan = {
        "id": identity,
        "source": source,
        "rows": rows,
        "shard_rows": shard_rows,
        "num_shards": num_shards,
    }
    ledger.write_plan(plan)  # last: a plan without it is written again from the start
    return plan


def _lines(source: str, limit: int | None) -> Iterator[str]:
    with fsspec.open(source, "rt", encoding="utf-8", errors="replace", newline="\n") as lines:
        count = 0
        for line in lines:
            if line.strip():
                if limit is not None and count >= limit:
                    return
                count += 1
                yield line.rstrip("\r\n")


def _identity(source: str, shard_rows: int, limit: int | None) -> str:
    digest = hashlib.sha256(f"{shard_rows}:{limit}:".encode())
    for line in _lines(source, limit):
        digest.update(line.encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _planned(source: str, shard_rows: int, limit: int | None) -> Iterator[list[dict[str, Any]]]:
    # 8 bytes of hash and a position for each URL: about 1.5 GB for CC12M's 12 million rows.
    first: dict[bytes, int] = {}
    batch: list[dict[str, Any]] = []
    for number, line in enumerate(_lines(source, limit)):
        url, _, caption = line.partition("\t")
        digest = hashlib.blake2b(url.strip().encode(), digest_size=8).digest()
        earlier = first.setdefault(digest, number)
        duplicate = None if earlier == number else sample_key(*divmod(earlier, shard_rows))
        text = " ".join(caption.split())[:MAX_CAPTION]
        batch.append({"url": url.strip(), "caption": text, "duplicate_of": duplicate})
        if len(batch) == shard_rows:
            yield batch
            batch = []
    if batch:
        yield batch


def fetch_stage(plan: dict, config: FetchConfig) -> Stage:
    """The stage of these rows under this policy."""
    params = {
        "plan": plan["id"],
        "pictures": asdict(config.pictures),
        "max_bytes": config.downloads.max_bytes,
        "honour_opt_out": config.downloads.honour_opt_out,
    }
    return Stage(name="fetch", version=1, params=params, outputs=("rgb", "caption"))


def fetch_job(plan: dict, config: FetchConfig) -> StageJob:
    """All planned shards as work for the stage runner."""
    downloads = asdict(config.downloads)
    downloads["addresses"] = sorted(config.downloads.addresses.allow_hosts)
    return StageJob(
        stage=fetch_stage(plan, config),
        factory="tasks.fetch:build_work",
        config={"pictures": asdict(config.pictures), "downloads": downloads},
        shards=tuple(range(plan["num_shards"])),
    )


def build_work(store_url: str, stage: Stage, config: dict) -> FetchWork:
    """The worker's side of :func:`fetch_job`."""
    downloads = dict(config["downloads"])
    downloads["addresses"] = AddressPolicy(frozenset(downloads["addresses"]))
    return FetchWork(
        Store(store_url), PicturePolicy(**config["pictures"]), DownloadPolicy(**downloads)
    )


class FetchWork:
    """Downloads and cleans one shard of the plan at a time."""

    def __init__(self, store: Store, pictures: PicturePolicy, downloads: DownloadPolicy) -> None:
        self._store = store
        self._pictures = pictures
        self._downloads = downloads
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="clean")

    def close(self) -> None:
        """Ends the cleaning threads."""
        self._threads.shutdown(cancel_futures=True)

    def run(self, shard: int) -> ShardData:
        """Fetches one shard.

        Raises:
            SystemicFailure: when nearly every row fails by the network.
        """
        started = time.monotonic()
        data = self._store.read(f"plan/rows/{shard_name(shard)}.parquet")
        rows = pq.read_table(pa.BufferReader(data)).to_pylist()
        fates: dict[int, tuple[str, str]] = {
            i: ("duplicate", f"of {row['duplicate_of']}")
            for i, row in enumerate(rows)
            if row["duplicate_of"]
        }
        wanted = [i for i in range(len(rows)) if i not in fates]
        bodies = asyncio.run(self._fetch(rows, wanted, fates))
        _stop_if_systemic(shard, [fates.get(i, ("ok", ""))[0] for i in wanted])
        _drop_repeated_bytes(shard, bodies, fates)
        return _shard_data(shard, rows, bodies, fates, time.monotonic() - started)

    async def _fetch(
        self, rows: list[dict[str, Any]], wanted: list[int], fates: dict[int, tuple[str, str]]
    ) -> dict[int, bytes]:
        """Clean pictures by row; the fate of every other wanted row goes into ``fates``."""
        loop = asyncio.get_running_loop()
        bodies: dict[int, bytes] = {}

        async def settle(row: int, download: Download) -> None:
            try:
                bodies[row] = await loop.run_in_executor(
                    self._threads, clean, download.body, self._pictures
                )
            except BadPicture as error:
                fates[row] = (error.reason, str(error))

        settling = []
        urls = [rows[i]["url"] for i in wanted]
        async for download in download_all(urls, self._downloads):
            row = wanted[download.index]
            if download.reason == "ok":
                settling.append(asyncio.ensure_future(settle(row, download)))
            else:
                fates[row] = (download.reason, download.detail)
        await asyncio.gather(*settling)
        return bodies


def _stop_if_systemic(shard: int, reasons: list[str]) -> None:
    failed = sum(reason in NETWORK for reason in reasons)
    if len(reasons) >= SYSTEMIC_MIN_ROWS and failed >= SYSTEMIC_SHARE * len(reasons):
        raise SystemicFailure(
            f"{failed} of {len(reasons)} rows of {shard_name(shard)} failed by the network "
            "(DNS, connection or time-out): check this machine's network, then run again; "
            "nothing of this shard was recorded"
        )


def _drop_repeated_bytes(
    shard: int, bodies: dict[int, bytes], fates: dict[int, tuple[str, str]]
) -> None:
    """Of pictures with equal bytes in a shard the first in plan order stays."""
    first: dict[bytes, int] = {}
    for row in sorted(bodies):
        digest = hashlib.sha256(bodies[row]).digest()
        earlier = first.setdefault(digest, row)
        if earlier != row:
            fates[row] = ("duplicate", f"of {sample_key(shard, earlier)}, byte for byte")
            del bodies[row]


def _shard_data(
    shard: int,
    rows: list[dict[str, Any]],
    bodies: dict[int, bytes],
    fates: dict[int, tuple[str, str]],
    seconds: float,
) -> ShardData:
    kept = sorted(bodies)
    caption = modalities.get("caption")
    keys = [sample_key(shard, row) for row in kept]
    pictures = write_tar((f"{sample_key(shard, row)}.jpg", bodies[row]) for row in kept)
    captions = write_tar(
        (f"{sample_key(shard, row)}.{caption.ext}", caption.encode(rows[row]["caption"]))
        for row in kept
    )
    statuses = [
        (sample_key(shard, row), *fates.get(row, ("ok", ""))) for row in range(len(rows))
    ]
    return ShardData(
        keys=keys,
        outputs={"rgb": pictures, "caption": captions},
        statuses=statuses,
        seconds=seconds,
    )
