"""A list that has grown, or another one: what is new in it becomes further shards of a dataset.

    plan/passes/0002.json     {name, first_shard, num_shards, rows, ..., list: {id, source}}

Nothing that is planned moves: keys, commits, labels and tokens stay, and the stages are the same,
so that every later step works on the new shards alone. What a newer list leaves out stays, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from infra.ledger import PASSES, Ledger, streamed
from infra.shards import MAX_SHARDS, shard_name
from infra.sources import Source, detect, read_rows
from infra.store import Store
from infra.tables import read_table
from tasks.plans import planned_lists, record, rows_at, survey, write_pass
from tasks.repeated_urls import first_seen, url_digest
from tasks.withdraw import withdrawn_urls

_FILES = ("folder", "webdataset")
_LOOKED_UP = 1 << 20
"""Rows that are looked up among the known ones at once: these alone grow in memory."""


def append_list(store: Store, source: Source, *, limit: int | None = None) -> int:
    """Plan the rows of a list whose URLs no list of the dataset names, each once, as further
    shards of as many rows as the others have.

    The URLs that are planned take 8 bytes each. Appending a list again plans nothing.

    Args:
        store: a planned dataset.
        source: the list.
        limit: only its first rows.

    Returns:
        Rows that were planned.

    Raises:
        ValueError: its pictures lie in another kind of place, there are too many, the list
            changed while it was read, or another pass was planned at the same time.
    """
    source, plan = detect(source), Ledger(store).read_plan()
    check_place(store, plan, source)
    with tempfile.TemporaryDirectory(prefix="fourm-plan-") as folder:
        path = Path(folder) / "digests"
        with path.open("wb") as digests:
            identity, read = survey(source, plan["shard_rows"], limit, digests)
        if not read or identity in planned_lists(plan):
            return 0
        new = _is_new(path, read, _known(store, plan))
        count = int(new.sum())
        number, first_shard = len(plan["passes"]) + 1, plan["num_shards"]
        name = f"{number:04d}-{identity[:12]}"
        shards = -(-count // plan["shard_rows"])
        if first_shard + shards > MAX_SHARDS:
            raise ValueError(
                f"{first_shard} shards and {shards} of {source.path} are more than a dataset has "
                f"at most, {MAX_SHARDS}"
            )
        rows = (record(row) for row, wanted in zip(read_rows(source, limit), new, strict=False)
                if wanted)  # fmt: skip
        for shard, batch in enumerate(_batches(rows, plan["shard_rows"]), start=first_shard):
            write_pass(store, name, shard, batch)
        with path.open("wb") as digests:
            if survey(source, plan["shard_rows"], limit, digests) != (identity, read):
                raise ValueError(f"{source.path} changed while it was read; append it again")
    entry = {
        "name": name,
        "first_shard": first_shard,
        "num_shards": shards,
        "rows": count,
        "witnesses": [],
        "list": {"id": identity, "source": source.path},
    }
    if count and not store.create_json(f"{PASSES}{number:04d}.json", entry):
        raise ValueError(f"another pass over {store.url} was planned meanwhile; append again")
    return count


def check_place(store: Store, plan: dict[str, Any], source: Source) -> None:
    """Raises ValueError for a list that cannot be appended to those of a plan: pictures of files
    and of the web are read in other ways, all of a dataset in the same."""
    if "rows" not in plan:
        raise ValueError(f"{store.url} was imported and has no list that could grow")
    kind = plan.get("format", "tsv")
    same = kind == source.format if kind in _FILES else source.format not in _FILES
    if not same or (kind == "folder" and source.path != plan["source"]):
        raise ValueError(
            f"{store.url} takes its pictures as {plan['source']} names them, and {source.path} "
            "names them otherwise: choose another root for it"
        )


def _is_new(path: Path, rows: int, known: np.ndarray) -> np.ndarray:
    """bool [rows]: the first of those with its digest, and not known. Sorts what is known."""
    digests = np.memmap(path, "<u8", "r", shape=(rows,))
    new = first_seen(path, rows) == np.arange(rows)
    known.sort()
    for begin in range(0, rows if len(known) else 0, _LOOKED_UP):
        some = digests[begin : begin + _LOOKED_UP]
        at = np.searchsorted(known, some).clip(max=len(known) - 1)
        new[begin : begin + _LOOKED_UP] &= known[at] != some
    return new


def _batches(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _known(store: Store, plan: dict[str, Any]) -> np.ndarray:
    """Digests of the rows of all lists, and of what was withdrawn from them, uint64; passes over
    failed rows only repeat them."""
    folder = rows_at(plan)
    paths = [f"{folder}/{shard_name(shard)}.parquet" for shard in range(plan["list_shards"])]
    for again in plan["passes"]:
        if "list" in again:
            numbers = range(again["first_shard"], again["first_shard"] + again["num_shards"])
            paths += [f"plan/passes/{again['name']}/{shard_name(n)}.parquet" for n in numbers]
    gone = np.frombuffer(b"".join(withdrawn_urls(store)), "<u8")
    return np.concatenate([gone, *streamed(lambda path: _digests(store, path), paths)])


def _digests(store: Store, path: str) -> np.ndarray:
    rows = read_table(store.read(path), ["url", "problem"]).to_pylist()
    found = b"".join(url_digest(row["url"], row.get("problem")) for row in rows)
    return np.frombuffer(found, "<u8")
