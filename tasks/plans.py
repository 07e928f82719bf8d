"""The plan of a dataset: which row of the list is which sample, decided once.

    plan/plan.json                     the list's digest, its rows and shards; written last
    plan/rows/shard-000123.parquet     the rows of a shard; where another list was in the way, in
                                       a folder of their own that plan.json names
    plan/passes/0001.json              further passes over rows that failed, and further lists
                                       (`tasks.growth`), each with its shards

A row's key depends on its place in the list alone, whatever else was downloaded. A further pass
appends shards of its own, so that nothing which is done changes: neither commits nor labels.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.download import RETRYABLE
from infra.ledger import OK, PASSES, Commit, Ledger, Stage, read_statuses
from infra.shards import MAX_SHARDS, sample_key, shard_name
from infra.sources import Row, Source, detect, read_rows
from infra.store import Store
from infra.tables import read_table
from tasks.repeated_urls import first_seen, url_digest

MAX_CAPTION = 4000
"""Longest alt text that is kept, in characters."""
WITNESSES = 8
"""URLs that once answered: they tell a dead network from a list of dead hosts."""

WITHDRAWALS, WITHDRAWN = "plan/withdrawn/", "withdrawn"
"""Records of what had to go, and the reason class of such rows; see `tasks.withdraw`."""

_ROWS_AT = "plan/rows"
_COLUMNS = ("url", "caption", "duplicate_of", "extra", "problem", "sidecar", "retry_of")
_ROWS = pa.schema([(name, pa.string()) for name in _COLUMNS])


def make_plan(
    store: Store, source: str | Source, *, shard_rows: int, limit: int | None = None
) -> dict[str, Any]:
    """Cut a list into shards of rows, once; of a WebDataset set, a shard is a tar.

    Planning the same list again returns the plan that stands. A row whose URL stood earlier in
    the list is planned as a duplicate and never downloaded. Memory does not grow with the list:
    it is read twice, and the digests of its URLs lie in a temporary file meanwhile.

    Raises:
        ValueError: the list is empty or too long, a column of it does not exist, or another list
            was planned in this dataset.
    """
    if shard_rows < 1 or shard_rows > 99_999:
        raise ValueError(f"shard_rows must be 1 to 99999, got {shard_rows}")
    source = detect(Source(path=source) if isinstance(source, str) else source)
    if source.format == "webdataset":
        shard_rows = 1
    with tempfile.TemporaryDirectory(prefix="fourm-plan-") as scratch:
        digests = Path(scratch, "digests")
        with digests.open("wb") as file:
            identity, rows = survey(source, shard_rows, limit, file)
        if store.exists("plan/plan.json"):
            return _standing(store, source, identity)
        shards = _number_of_shards(source, rows, shard_rows)
        place = _placed(store, source, shard_rows, limit, identity, first_seen(digests, rows))
    plan: dict[str, Any] = {
        "id": identity,
        "source": source.path,
        "rows": rows,
        "shard_rows": shard_rows,
        "num_shards": shards,
    }
    if not source.plain:
        plan["format"] = source.format
        plan["columns"] = [source.url, source.caption, *source.extra]
    if place != _ROWS_AT:
        plan["rows_at"] = place
    ledger = Ledger(store)
    try:
        ledger.write_plan(plan)  # last: a plan without it is written again from the start
    except ValueError:
        _drop_unplanned(store)
        raise
    _drop_unplanned(store)
    return ledger.read_plan()


def _standing(store: Store, source: Source, identity: str) -> dict[str, Any]:
    """The plan that stands, where it is of this list."""
    plan = Ledger(store).read_plan()
    if identity not in planned_lists(plan):
        raise ValueError(
            f"{store.url} was planned from {plan['source']} with {plan['shard_rows']} rows "
            "a shard, and a plan never changes: --append adds what is new in "
            f"{source.path} as further shards; else choose another root for it"
        )
    return plan


def _number_of_shards(source: Source, rows: int, shard_rows: int) -> int:
    if not rows:
        hint = ": expected lines of the form url<TAB>caption" if source.plain else ""
        raise ValueError(f"{source.path} holds no rows{hint}")
    if (shards := -(-rows // shard_rows)) > MAX_SHARDS:
        raise ValueError(
            f"{rows} rows are {shards} shards of {shard_rows} rows, and a dataset has at most "
            f"{MAX_SHARDS}: raise shard_rows"
        )
    return shards


def _placed(
    store: Store, source: Source, shard_rows: int, limit: int | None, identity: str,
    first: np.ndarray,
) -> str:
    """Put the rows of every shard; returns their folder, another than the usual one where rows of
    another list lie there."""
    place, written = _ROWS_AT, _write_rows(store, _ROWS_AT, source, shard_rows, limit, first)
    if written is None:
        place = f"{_ROWS_AT}-{identity[:12]}"
        written = _write_rows(store, place, source, shard_rows, limit, first)
    if written != identity:
        raise ValueError(f"{source.path} changed while it was read; plan it again")
    return place


class _Digest:
    """The identity of a list, fed with its rows."""

    def __init__(self, source: Source, shard_rows: int, limit: int | None) -> None:
        self._digest = hashlib.sha256(f"{shard_rows}:{limit}:".encode())
        if not source.plain:
            about = replace(source, path="")
            self._digest.update(f"{json.dumps(vars(about), sort_keys=True)}\n".encode())

    def over(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Passes the rows through."""
        for row in rows:
            self._digest.update(row.text.encode("utf-8", "replace"))
            self._digest.update(b"\n")
            yield row

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def planned_lists(plan: dict[str, Any]) -> set[str]:
    """Identities of the lists that a dataset was planned from."""
    return {plan["id"], *(again["list"]["id"] for again in plan["passes"] if "list" in again)}


def survey(
    source: Source, shard_rows: int, limit: int | None, digests: BinaryIO
) -> tuple[str, int]:
    """Identity and number of rows; the 8 bytes of each row's `url_digest` go into the file."""
    digest, count = _Digest(source, shard_rows, limit), 0
    for row in digest.over(read_rows(source, limit)):
        digests.write(url_digest(row.url, row.problem))
        count += 1
    return digest.hexdigest(), count


def _write_rows(
    store: Store, folder: str, source: Source, shard_rows: int, limit: int | None,
    first: np.ndarray,
) -> str | None:
    """Put the rows of every shard.

    Returns:
        The identity of what was read this time; None where rows of another list lie there, of
        somebody who plans it at this moment or was killed while doing so.
    """
    digest = _Digest(source, shard_rows, limit)
    batch: list[dict[str, Any]] = []
    shard = 0
    for number, row in enumerate(digest.over(read_rows(source, limit))):
        if number >= len(first):
            break
        earlier = int(first[number])
        again = earlier != number and not row.problem
        batch.append(record(row, sample_key(*divmod(earlier, shard_rows)) if again else None))
        if len(batch) == shard_rows:
            if not _put_rows(store, folder, shard, batch):
                return None
            batch, shard = [], shard + 1
    if batch and not _put_rows(store, folder, shard, batch):
        return None
    return digest.hexdigest()


def _put_rows(store: Store, folder: str, shard: int, rows: list[dict[str, Any]]) -> bool:
    """Put the rows of a shard; False where others lie in their place."""
    path, data = f"{folder}/{shard_name(shard)}.parquet", _parquet(rows)
    if folder != _ROWS_AT:  # of this list alone
        store.write(path, data)
        return True
    return store.create(path, data) or store.read(path) == data


def _drop_unplanned(store: Store) -> None:
    """Remove rows that the plan does not name, of whoever was not the first to write one."""
    stands = rows_at(Ledger(store).read_plan())
    for path in store.list(_ROWS_AT):
        if path.rpartition("/")[0] != stands:
            store.delete(path)


def rows_at(plan: dict[str, Any]) -> str:
    """The folder of the rows of the first list."""
    return str(plan.get("rows_at", _ROWS_AT))


def record(row: Row, duplicate_of: str | None = None) -> dict[str, Any]:
    """A row of a list as the plan keeps it."""
    return {
        "url": row.url,
        "caption": " ".join(row.caption.split())[:MAX_CAPTION],
        "duplicate_of": duplicate_of,
        "extra": row.extra or None,
        "problem": row.problem or None,
        "sidecar": row.sidecar or None,
    }


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_ROWS), buffer, compression="zstd")
    return buffer.getvalue()


def withdrawals(store: Store) -> list[dict[str, Any]]:
    """Records of what had to go, the oldest first; see `tasks.withdraw`."""
    paths = sorted(path for path in store.list(WITHDRAWALS) if path.endswith(".json"))
    return [store.read_json(path) for path in paths]


class Plan:
    """Reads the planned rows of a dataset."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.about: dict[str, Any] = Ledger(store).read_plan()

    @property
    def format(self) -> str:
        """What the list is; a list of URLs unless it says otherwise."""
        return str(self.about.get("format", "tsv"))

    def rows(self, shard: int) -> list[dict[str, Any]]:
        """The rows of a shard in order: url, caption, duplicate_of, extra, problem, sidecar."""
        rows = read_table(self._store.read(self.path(shard))).to_pylist()
        return [dict.fromkeys(_COLUMNS) | row for row in rows]

    def path(self, shard: int) -> str:
        """Where the rows of a shard lie."""
        again = self.retry_of(shard)
        folder = f"plan/passes/{again['name']}" if again else rows_at(self.about)
        return f"{folder}/{shard_name(shard)}.parquet"

    def withdrawn(self) -> set[str]:
        """Keys of the samples that had to go, see `tasks.withdraw`."""
        return {key for record in withdrawals(self._store) for key in record["keys"]}

    def retry_of(self, shard: int) -> dict[str, Any] | None:
        """The pass over failed rows, or the further list, that a shard belongs to; None for shards
        of the first list."""
        for again in self.about.get("passes", ()):
            if again["first_shard"] <= shard < again["first_shard"] + again["num_shards"]:
                return dict(again)
        return None


def check_retry(store: Store) -> None:
    """Raises ValueError for a dataset of files: what is wrong with them does not pass."""
    if Plan(store).format in ("folder", "webdataset"):
        raise ValueError(f"{store.url} holds pictures of files, which have no passing failures")


def plan_retry(store: Store, stage: Stage, reasons: Iterable[str] = RETRYABLE) -> dict[str, Any]:
    """Plan one more pass over the rows that failed for passing reasons, as further shards.

    What is done stays untouched: its commits, and with them labels and tokens. A pass takes up
    the failures of the pass before it, so that each row is under way once.

    Args:
        stage: the download stage, with every planned shard committed or quarantined.
        reasons: reason classes to try again.

    Returns:
        The pass: {name, first_shard, num_shards, rows, reasons, witnesses}; rows is 0, and
        nothing is planned, when nothing is worth it.

    Raises:
        ValueError: a reason is none that another attempt may mend, or shards are still to do.
    """
    reasons = sorted(reasons)
    if unknown := set(reasons) - RETRYABLE:
        raise ValueError(f"{min(unknown)!r} cannot be mended; choose from {sorted(RETRYABLE)}")
    check_retry(store)
    ledger, plan = Ledger(store), Plan(store)
    if left := ledger.todo(stage, range(plan.about["num_shards"])):
        raise ValueError(f"{len(left)} shards are not downloaded yet; run `fourm ingest` first")
    passes = plan.about["passes"]
    # Lists that were appended since the last pass over failed rows are to be looked at, too.
    since = max((again["first_shard"] for again in passes if "list" not in again), default=0)
    number, first_shard = len(passes) + 1, plan.about["num_shards"]
    commits = dict(sorted(ledger.commits(stage).items()))
    # Commits never change, so these name the failed rows without a look at them.
    origin = [reasons, [commits[shard].status["sha256"] for shard in commits if shard >= since]]
    name = f"{number:04d}-{hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:12]}"
    batch: list[dict[str, Any]] = []
    rows = shards = 0
    for row in _failed(store, plan, commits, since, frozenset(reasons)):
        rows += 1
        batch.append(row)
        if len(batch) == plan.about["shard_rows"]:
            write_pass(store, name, first_shard + shards, batch)
            batch, shards = [], shards + 1
    if batch:
        write_pass(store, name, first_shard + shards, batch)
        shards += 1
    again = {
        "name": name,
        "first_shard": first_shard,
        "num_shards": shards,
        "rows": rows,
        "reasons": reasons,
        "witnesses": _witnesses(store, commits),
    }
    if rows and not store.create_json(f"{PASSES}{number:04d}.json", again):
        raise ValueError(f"pass {number} over {store.url} is planned already; run it first")
    return again


def write_pass(store: Store, name: str, shard: int, rows: list[dict[str, Any]]) -> None:
    """Puts the rows of a shard that a pass appends."""
    write_rows(store, f"plan/passes/{name}/{shard_name(shard)}.parquet", rows)


def write_rows(store: Store, path: str, rows: list[dict[str, Any]]) -> None:
    """Puts rows as the plan keeps them."""
    store.write(path, _parquet(rows))


def _failed(
    store: Store, plan: Plan, commits: dict[int, Commit], since: int, reasons: frozenset[str]
) -> Iterator[dict[str, Any]]:
    """Rows of the shards from `since` on that failed for the reasons."""
    for shard, commit in commits.items():
        if shard < since or not reasons & commit.drops.keys():
            continue
        fates = read_statuses(store, commit, ["reason"])["reason"].to_pylist()
        for number, (row, fate) in enumerate(zip(plan.rows(shard), fates, strict=True)):
            if fate in reasons:
                yield {**row, "retry_of": row["retry_of"] or sample_key(shard, number)}


def _witnesses(store: Store, commits: dict[int, Commit]) -> list[str]:
    """URLs on different hosts whose pictures came."""
    found: dict[str, str] = {}
    for commit in commits.values():
        table = read_statuses(store, commit)
        if not commit.samples or "url" not in table.column_names:
            continue
        for row in table.select(["reason", "url"]).to_pylist():
            if row["reason"] == OK:
                found.setdefault(row["url"].partition("://")[2].partition("/")[0], row["url"])
            if len(found) == WITNESSES:
                return list(found.values())
    return list(found.values())
