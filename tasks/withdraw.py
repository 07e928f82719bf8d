"""Samples that must go: out of the plan, every shard, every manifest, for good.

    plan/withdrawn/0001.json     {created, keys, urls: digests of their URLs, objects: replaced}

This is the one act that changes what is committed. Of the shards that hold such a sample every
output of every stage is written anew without it, under the hash of what it is now; its status rows
say `withdrawn` and no more. Commits and manifests then tell what is there now, and what held the
samples is deleted. No stage changes its fingerprint and no manifest its version, so nothing is
made again, and a training that is not finished goes on without them, in other batches.
The record comes first: a withdrawal that was cut off ends when any is run again, and a list that
is appended later does not bring the URLs back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from infra.blocks import BlockReader, BlockWriter, is_blocks
from infra.ledger import (
    PASSES,
    Commit,
    Ledger,
    commit_path,
    count_drops,
    read_keys,
    read_statuses,
    streamed,
)
from infra.manifest import Manifest, amend, load_manifest, manifest_names, output_of, versions
from infra.shards import (
    key_digest,
    read_tar,
    sample_key,
    scan_tar,
    shard_name,
    split_name,
    write_tar,
)
from infra.store import Store
from infra.tables import parquet_bytes, read_table
from tasks.janitor import LEAST_AGE, named_objects
from tasks.plans import (
    WITHDRAWALS,
    WITHDRAWN,
    Plan,
    withdrawals,
    write_rows,
)
from tasks.repeated_urls import url_digest


@dataclass
class Withdrawn:
    """What a withdrawal found, and did if it was to."""

    keys: list[str] = field(default_factory=list)
    """Samples that are named: by their key, or by their URL wherever it stands in a list."""
    unknown: list[str] = field(default_factory=list)
    """What was asked for and is neither the key nor the URL of a row."""
    copies: list[str] = field(default_factory=list)
    """Other samples with the same bytes, which stay."""
    commits: int = 0
    """Commits whose shards held some of them."""
    manifests: list[str] = field(default_factory=list)
    """Versions that named some of them."""
    removed: int = 0
    """Objects that were deleted."""


def withdraw(store: Store, wanted: Collection[str], *, apply: bool) -> Withdrawn:
    """Take samples out of a dataset.

    Args:
        wanted: keys and URLs.
        apply: do it; otherwise only say what would be done.

    Raises:
        ValueError: a commit or manifest cannot be understood, so that nobody could say what is
            still named; nothing is deleted.
    """
    plan = Plan(store)
    rows = _rows(store, plan, set(wanted))
    records = withdrawals(store)
    # Of earlier withdrawals, too: one may have been cut off, or something was committed meanwhile.
    keys = {*rows, *(key for record in records for key in record["keys"])}
    digests = {digest for record in records for digest in record["urls"]}
    known = {*keys, *rows.values()}
    commits = list(_holding(store, keys))
    found = Withdrawn(
        keys=sorted(rows),
        unknown=sorted(one for one in set(wanted) - known if _digest(one) not in digests),
        copies=_copies(store, keys),
        commits=len(commits),
    )
    if not apply:
        return found
    if rows or commits:
        record = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "keys": found.keys,
            "urls": sorted({_digest(url) for url in rows.values() if url}),
            "objects": sorted({path for commit in commits for path in _paths(commit)}),
        }
        number = len(records) + 1
        while not store.create_json(f"{WITHDRAWALS}{number:04d}.json", record):
            number += 1
    _forget_rows(store, plan, rows)
    _forget_witnesses(store, set(map(bytes.hex, withdrawn_urls(store))))
    _rewrite(store, commits, keys)
    shards = {int(key[:6]) for key in keys}
    found.manifests = [at for name in manifest_names(store) for at in _amended(store, name, shards)]
    found.removed = _delete(store, shards)
    return found


def withdrawn_urls(store: Store) -> Iterator[bytes]:
    """`url_digest` of every URL that was withdrawn."""
    for record in withdrawals(store):
        yield from map(bytes.fromhex, record["urls"])


def come_back(store: Store, stages: Collection[str] | None = None) -> list[str]:
    """Samples that had to go and are there all the same: a run that was at work meanwhile has
    written them.

    Args:
        stages: ids of those to look at; None for all.
    """
    keys = Plan(store).withdrawn()
    return sorted({key for commit in _holding(store, keys, stages)
                   for key in _told(store, commit, keys)})  # fmt: skip


def _digest(url: str) -> str:
    return url_digest(url, None).hex()


def _is_key(text: str) -> bool:
    return len(text) == 11 and text.isdecimal()


def _rows(store: Store, plan: Plan, wanted: set[str]) -> dict[str, str]:
    """Key -> URL of the rows that are meant; "" where the plan knows samples by their keys alone,
    as of tars and imported sets."""
    keys = {one for one in wanted if _is_key(one)}
    if plan.format == "webdataset" or "rows" not in plan.about:
        there = {key for commit in _holding(store, keys) for key in _keys(store, commit)}
        return dict.fromkeys(sorted(keys & there), "")
    shards = range(plan.about["num_shards"])
    found: dict[str, str] = {}
    for shard in sorted({int(key[:6]) for key in keys}.intersection(shards)):
        named = {sample_key(shard, n): row for n, row in enumerate(plan.rows(shard))}
        found |= {key: row["url"] for key, row in named.items()
                  if key in keys and row["problem"] != WITHDRAWN}  # fmt: skip
    asked = pa.array(sorted({*wanted, *found.values()} - {""}), pa.string())
    urls = streamed(lambda shard: read_table(store.read(plan.path(shard)), ["url"])["url"], shards)
    for shard, column in zip(shards, urls, strict=True):
        at = pc.indices_nonzero(pc.is_in(column, asked)).to_pylist()
        found |= {sample_key(shard, n): column[n].as_py() for n in at}
    return found


def _holding(
    store: Store, keys: Collection[str], stages: Collection[str] | None = None
) -> Iterator[Commit]:
    """Commits of which an output holds one of the keys, or whose statuses tell of it."""
    ledger = Ledger(store)
    shards = sorted({int(key[:6]) for key in keys})
    for stage in (ledger.stage_ids() if stages is None else sorted(stages)) if shards else ():
        for shard in ledger.committed(stage).intersection(shards):
            commit = ledger.read_commit(stage, shard)
            if _told(store, commit, keys):
                yield commit


def _told(store: Store, commit: Commit, keys: Collection[str]) -> set[str]:
    """Which of the keys a commit tells more of than that they were withdrawn."""
    rows = read_statuses(store, commit, ["key", "reason", "detail"]).to_pylist()
    return {row["key"] for row in rows
            if row["key"] in keys and WITHDRAWN not in (row["reason"], row["detail"])}  # fmt: skip


def _keys(store: Store, commit: Commit) -> list[str]:
    return list(read_statuses(store, commit, ["key"])["key"].to_pylist())


def _paths(commit: Commit) -> list[str]:
    return [entry["path"] for entry in (*commit.outputs.values(), commit.status)]


def _copies(store: Store, keys: Collection[str]) -> list[str]:
    """Samples that repeat one of these byte for byte, or are repeated by it, and are none of
    them."""
    origin: dict[str, str] = {}
    for path in store.list("reports/duplicates@"):
        for row in read_table(store.read(path)).to_pylist():
            if row["kind"] == "duplicate":
                origin[row["key"]] = row["duplicate_of"]
    first = {origin.get(key, key) for key in keys}
    alike = {key for key, earlier in origin.items() if earlier in first}
    return sorted((alike | (first & set(origin.values()))) - set(keys))


def _forget_rows(store: Store, plan: Plan, rows: Iterable[str]) -> None:
    """Leave of the planned rows nothing but their place."""
    if "rows" not in plan.about or plan.format == "webdataset":
        return
    for shard, of_shard in groupby(sorted(rows), key=lambda key: int(key[:6])):
        content, gone = plan.rows(shard), {int(key[6:]) for key in of_shard}
        for number in gone:
            content[number] = dict.fromkeys(content[number]) | {
                "url": "", "caption": "", "problem": WITHDRAWN,
            }  # fmt: skip
        write_rows(store, plan.path(shard), content)


def _forget_witnesses(store: Store, digests: set[str]) -> None:
    """Passes over failed rows name some URLs that once answered."""
    for path in store.list(PASSES):
        if not path.endswith(".json"):
            continue
        entry = store.read_json(path)
        left = [url for url in entry["witnesses"] if _digest(url) not in digests]
        if left != entry["witnesses"]:
            store.write_json(path, entry | {"witnesses": left})


def _rewrite(store: Store, commits: list[Commit], keys: set[str]) -> None:
    """Put what the commits name without the samples, then the commits in place of the old ones."""
    moved: dict[str, str] = {}
    fresh = []
    for commit in commits:
        outputs, left = {}, []
        for modality, old in commit.outputs.items():
            data = _without(store.read(old["path"]), old["path"], keys)
            left = read_keys(data, old["path"])
            outputs[modality] = _put(store, old["path"], data)
            moved[old["sha256"]] = outputs[modality]["sha256"]
        table = _silenced(read_statuses(store, commit), keys)
        fresh.append(replace(
            commit, outputs=outputs, samples=len(left), key_digest=key_digest(left),
            status=_put(store, commit.status["path"], parquet_bytes(table)),
            drops=count_drops(table["reason"].to_pylist()),
        ))  # fmt: skip
    for commit in fresh:
        upstream = {stage: {name: moved.get(sha, sha) for name, sha in read.items()}
                    for stage, read in commit.upstream.items()}  # fmt: skip
        record = asdict(replace(commit, upstream=upstream))
        store.write_json(commit_path(commit.stage, commit.shard), record)


def _without(data: bytes, source: str, keys: set[str]) -> bytes:
    """A tar of members, or of blocks, without these samples."""
    if not is_blocks(scan_tar(data, source)):
        return write_tar((name, member) for name, member in read_tar(data, source=source)
                         if split_name(name)[0] not in keys)  # fmt: skip
    reader = BlockReader.from_bytes(data, source)
    writer = BlockWriter(reader.columns, reader.metadata)
    valid = {name: reader.valid(name) for name in reader.columns}
    for number, key in enumerate(reader.keys):
        if key not in keys:
            writer.add(key, {
                name: None if not valid[name][number]
                else reader.ragged(name, number) if column.length is None
                else reader.fixed_rows(name, [number])[0]
                for name, column in reader.columns.items()
            })  # fmt: skip
    return writer.finish()


def _put(store: Store, old: str, data: bytes) -> dict[str, Any]:
    """Put content beside what it replaces, under its own hash."""
    digest = hashlib.sha256(data).hexdigest()
    stem, _, extension = old.rsplit(".", 2)
    path = f"{stem}.{digest[:12]}.{extension}"
    store.write(path, data)
    return {"path": path, "sha256": digest, "bytes": len(data)}


def _silenced(table: pa.Table, keys: set[str]) -> pa.Table:
    """Statuses of which those of the samples say that they are withdrawn, and nothing else."""
    gone = pc.is_in(table["key"], pa.array(sorted(keys), pa.string()))
    for number, name in enumerate(table.column_names):
        if name in ("key", "shard", "retry_of"):
            continue
        said = {"reason": WITHDRAWN, "detail": ""}.get(name)
        value = pa.scalar(said, table.schema.field(name).type)
        column = pc.if_else(gone, value, table[name])
        table = table.set_column(number, table.schema.field(name), column)
    return table


def _amended(store: Store, name: str, shards: set[int]) -> Iterator[str]:
    """Let every version of a manifest name what its commits name now."""
    for version in versions(store, name):
        old = load_manifest(store, name, version)
        entries = _entries(store, old, shards)
        if entries != old.entries:
            amend(store, replace(old, entries=entries))
            yield f"{name} v{version}"


def _entries(store: Store, manifest: Manifest, shards: set[int]) -> dict[int, dict[str, Any]]:
    """The entries of a manifest as the commits are now."""
    entries, ledger = dict(manifest.entries), Ledger(store)
    for shard in shards & entries.keys():
        entry = {**entries[shard], "outputs": {}}
        for modality, about in manifest.modalities.items():
            commit = ledger.read_commit(about["stage"], shard)
            made = commit.outputs[output_of(modality)]
            entry["outputs"][modality] = {name: made[name] for name in ("path", "sha256", "bytes")}
            entry |= {"samples": commit.samples, "key_digest": commit.key_digest}
        entries[shard] = entry
    return entries


def _delete(store: Store, shards: set[int]) -> int:
    """Remove what withdrawals replaced, and what workers of these shards left that were killed."""
    named = named_objects(store)
    if named is None:
        raise ValueError(f"{store.url}: a commit or manifest cannot be read, see `fourm verify`; "
                         "run this again once that is mended: what was replaced is still there")
    replaced = {path for record in withdrawals(store) for path in record["objects"]}
    stems = {shard_name(shard) for shard in shards}
    old = store.now() - LEAST_AGE
    removed = 0
    for path, entry in {**store.entries("shards/"), **store.entries("status/")}.items():
        left = path.rpartition("/")[2].partition(".")[0] in stems and entry.modified < old
        if path not in named and (path in replaced or left):
            store.delete(path)
            removed += 1
    return removed
