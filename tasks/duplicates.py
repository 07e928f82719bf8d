"""Pictures that repeat earlier ones of the set: marked in a table, and left out if so chosen.

Of equal or alike pictures the first in the order of keys stays. A mark therefore depends on
earlier rows alone, so that shards which a later pass appends change no mark that stands.

    exact   the stored bytes are equal
    near    the difference hashes (`tasks.pictures.difference_hash`) part in at most 3 of 64 bits
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.ledger import OK, Commit, Ledger, ShardData, Stage, read_statuses
from infra.runner import StageJob
from infra.shards import read_tar, split_name, write_tar
from infra.store import Store
from infra.tables import read_table

Drop = Literal["drop_exact", "drop_near"]
NEAR_BITS = 3
"""Bits in which hashes of alike pictures may part."""
MIN_BITS = 5
"""Pictures with fewer set (or unset) bits are nearly flat: their hashes tell nothing."""

_PARTS = [np.uint64(sum(1 << bit for bit in range(part, 64, 6))) for part in range(6)]
"""Six parts of a hash. Of alike ones three parts at least are equal, and few others have these
equal too. A part has bits from all over the picture: neighbours mostly tell the same."""
_READERS = 16
_EXACT, _NEAR = "duplicate", "near_duplicate"
_MARKS = pa.schema(
    [
        ("key", pa.string()),
        ("duplicate_of", pa.string()),
        ("kind", pa.string()),
        ("bits", pa.int8()),
    ]
)


def mark_duplicates(store: Store, download: Stage) -> tuple[str, pa.Table]:
    """Find what repeats among the committed pictures, and put the marks into the reports.

    Shards that were committed before hashes were recorded have no marks. Marks of the same
    shards are read back: commits do not change.

    Args:
        store: the dataset.
        download: the stage that wrote the pictures, with no shard left to do.

    Returns:
        Path of the Parquet table, and the table: key, duplicate_of, kind (duplicate or
        near_duplicate), bits in which the hashes part. It is sorted by key.
    """
    commits = dict(sorted(Ledger(store).commits(download).items()))
    about = hashlib.sha256(json.dumps([NEAR_BITS, MIN_BITS, *commits]).encode()).hexdigest()
    path = f"reports/duplicates@{download.fingerprint[:8]}.{about[:12]}.parquet"
    if store.exists(path):
        return path, read_table(store.read(path))
    keys, digests, hashes = _hashes(store, commits)
    first, bits = find_duplicates(digests, hashes)
    marked = np.flatnonzero(first >= 0)
    kinds = np.where(bits[marked] < 0, _EXACT, _NEAR)
    table = pa.table(
        [
            keys.take(pa.array(marked)),
            keys.take(pa.array(first[marked])),
            pa.array(kinds.astype(object), pa.string()),
            pa.array(np.maximum(bits[marked], 0), pa.int8()),
        ],
        schema=_MARKS,
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    store.write(path, sink.getvalue().to_pybytes())
    return path, table


def _hashes(store: Store, commits: Mapping[int, Commit]) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """Keys of all pictures in order, the first 8 bytes of their sha256, and their hashes."""
    none = np.zeros(0, np.uint64)
    keys, digests, hashes = [pa.array([], pa.string())], [none], [none]
    with ThreadPoolExecutor(_READERS) as pool:
        for found in pool.map(lambda commit: _of_commit(store, commit), commits.values()):
            if found is not None:
                for column, values in zip((keys, digests, hashes), found, strict=True):
                    column.append(values)
    return pa.concat_arrays(keys), np.concatenate(digests), np.concatenate(hashes)


def _of_commit(store: Store, commit: Commit) -> tuple[pa.Array, np.ndarray, np.ndarray] | None:
    """The same of one shard; None where no hashes were recorded."""
    table = read_statuses(store, commit, ["key", "reason", "stored_sha256", "dhash"])
    if "dhash" not in table.column_names:
        return None
    table = table.filter(pc.equal(table["reason"], OK)).combine_chunks()
    digests = [int(digest[:16], 16) for digest in table["stored_sha256"].to_pylist()]
    hashes = table["dhash"].to_numpy().astype(np.uint64)
    return table["key"].combine_chunks(), np.array(digests, np.uint64), hashes


def find_duplicates(digests: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each picture the earlier one that it repeats.

    Args:
        digests: uint64 [n], equal for equal bytes.
        hashes: uint64 [n], difference hashes.

    Returns:
        int64 [n], the earlier picture or -1; and int64 [n], the bits in which the two hashes
        part, -1 for equal bytes and for pictures that repeat none. The earlier picture of a near
        duplicate is the first of those alike that itself repeats none.
    """
    first = np.full(len(digests), -1, np.int64)
    bits = np.full(len(digests), -1, np.int64)
    _, start, group = np.unique(digests, return_index=True, return_inverse=True)
    repeats = start[group] != np.arange(len(digests))
    first[repeats] = start[group][repeats]
    told = np.bitwise_count(hashes)
    usable = np.flatnonzero(~repeats & (told >= MIN_BITS) & (told <= 64 - MIN_BITS))
    # Equal hashes are compared once; their first picture speaks for all of them.
    values, where, which = np.unique(hashes[usable], return_index=True, return_inverse=True)
    speaker = usable[where]
    origin = speaker[which]
    again = origin != usable
    first[usable[again]], bits[usable[again]] = origin[again], 0
    for later, earlier, apart in _alike(values, speaker):
        if bits[later] < 0 and bits[earlier] < 0:
            first[later], bits[later] = earlier, apart
    _follow(first, bits, repeats)
    return first, bits


def _follow(first: np.ndarray, bits: np.ndarray, exact: np.ndarray) -> None:
    """Let what is alike to a picture that turned out to repeat another name that other one."""
    for member in np.flatnonzero((first >= 0) & ~exact):
        origin = first[member]
        if first[origin] >= 0 and not exact[origin]:
            first[member], bits[member] = first[origin], max(bits[member], bits[origin])


def _alike(values: np.ndarray, speaker: np.ndarray) -> Iterator[list[int]]:
    """[later, earlier, bits apart] of all pairs within `NEAR_BITS`, by the later, then earlier."""
    found = [np.zeros((0, 3), np.int64)]
    masks = [np.bitwise_or.reduce(parts) for parts in combinations(_PARTS, 6 - NEAR_BITS)]
    for number, mask in enumerate(masks):
        found += _pairs(values, speaker, mask, masks[:number])
    pairs = np.unique(np.concatenate(found), axis=0)
    for at in range(0, len(pairs), 1 << 16):
        yield from pairs[at : at + (1 << 16)].tolist()


def _pairs(
    values: np.ndarray, speaker: np.ndarray, mask: np.uint64, others: Sequence[np.uint64]
) -> Iterator[np.ndarray]:
    """Pairs within `NEAR_BITS` that are equal under a mask and under none of others, int64 [m, 3]:
    later, earlier, bits apart. Sorted by what is under the mask, each value is compared with the
    next, the next but one, and so on, as long as these are equal there."""
    order = np.argsort(values & mask)
    values, step = values[order], 1
    at = np.flatnonzero((values[1:] ^ values[:-1]) & mask == 0)
    while len(at):
        apart = values[at] ^ values[at + step]
        near = np.bitwise_count(apart) <= NEAR_BITS
        near &= np.all([apart & other != 0 for other in others], axis=0)
        a, b = speaker[order[at[near]]], speaker[order[at[near] + step]]
        bits = np.bitwise_count(apart[near])
        yield np.stack([np.maximum(a, b), np.minimum(a, b), bits.astype(np.int64)], axis=1)
        step += 1
        at = at[at < len(values) - step]
        at = at[(values[at] ^ values[at + step]) & mask == 0]


def distinct_stage(download: Stage, drop: Drop) -> Stage:
    """The stage that writes the pictures and captions again, without those that repeat others."""
    params: dict[str, Any] = {"drop": drop}
    if drop == "drop_near":
        params |= {"bits": NEAR_BITS, "min_bits": MIN_BITS}
    return Stage("distinct", 1, params, download.outputs, (download,))


def distinct_job(store: Store, download: Stage, drop: Drop, marks: str) -> StageJob:
    """All downloaded shards as work for the stage runner.

    Args:
        marks: path of the table that `mark_duplicates` wrote.
    """
    shards = tuple(sorted(Ledger(store).committed(download)))
    stage = distinct_stage(download, drop)
    return StageJob(stage, "tasks.duplicates:build_work", {"marks": marks}, shards)


def build_work(store_url: str, stage: Stage, config: dict[str, Any]) -> DistinctWork:
    """The worker's side of `distinct_job`."""
    return DistinctWork(Store(store_url), stage, config["marks"])


class DistinctWork:
    """Writes one shard at a time without its duplicates."""

    def __init__(self, store: Store, stage: Stage, marks: str) -> None:
        self._ledger, self._stage = Ledger(store), stage
        kinds = {_EXACT, _NEAR} if stage.params["drop"] == "drop_near" else {_EXACT}
        table = read_table(store.read(marks))
        self._marks = table.filter(pc.is_in(table["kind"], pa.array(sorted(kinds))))

    def run(self, shard: int) -> ShardData:
        """One shard; the status of what is left out names the earlier picture."""
        began = time.monotonic()
        (download,) = self._stage.upstream
        outputs: dict[str, bytes] = {}
        keys: list[str] = []
        statuses: list[tuple[str, str, str]] = []
        marked: dict[str, tuple[str, str]] = {}
        for modality in download.outputs:
            path, sha256 = self._ledger.open_output(download, shard, modality)
            tar = read_tar(path, sha256=sha256)
            members = [(split_name(name)[0], name, data) for name, data in tar]
            if not statuses:
                marked = self._of([key for key, _, _ in members])
                keys = [key for key, _, _ in members if key not in marked]
                statuses = [(key, *marked.get(key, (OK, ""))) for key, _, _ in members]
            kept = ((name, data) for key, name, data in members if key not in marked)
            outputs[modality] = write_tar(kept)
        return ShardData(keys, outputs, statuses, time.monotonic() - began)

    def _of(self, keys: list[str]) -> dict[str, tuple[str, str]]:
        """Reason and detail of those keys that are to be left out."""
        wanted = pa.array(keys, pa.string())
        found = self._marks.filter(pc.is_in(self._marks["key"], wanted))
        return {row["key"]: (row["kind"], f"of {row['duplicate_of']}") for row in found.to_pylist()}
