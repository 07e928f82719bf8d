"""The record of what is done: a stage's shard exists once its commit exists.

A unit of work is published in three steps: the tars are checked and put at addresses that hold
their hash, then the statuses of the samples likewise, then the commit is created if it is absent.
Dying anywhere before the last step leaves objects that nobody refers to; two workers at the same
shard end with the first one's commit. So resuming is a subtraction: planned - committed -
quarantined, each from one listing, and there is no lock and no database. What must go for good
(`tasks.withdraw`) is the one reason for which a commit is ever replaced.

Statuses are addressed by content like the tars, so that a slower worker whose downloads went
otherwise cannot overwrite what the winner's commit describes.
"""

from __future__ import annotations

import hashlib
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from os import environ
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from infra.blocks import BlockReader, is_blocks
from infra.machine import commit_hash
from infra.shards import key_digest, member_keys, scan_tar, shard_name
from infra.stages import Commit, ShardData, Stage
from infra.store import Store, json_bytes
from infra.tables import read_table

MAX_ATTEMPTS = 3
"""Attempts after which a unit that never commits is quarantined."""

OK = "ok"
"""Status of a sample that has its output; any other is a reason class."""

STATUS_SCHEMA = pa.schema(
    [("key", pa.string()), ("reason", pa.string()), ("detail", pa.string()), ("shard", pa.int32())]
)

PASSES = "plan/passes/"
"""Folder of the records of further passes over rows that failed."""

_READERS = 32
_AHEAD = 1024
_T = TypeVar("_T")
_R = TypeVar("_R")


class Ledger:
    """Plan, commits, attempts and quarantine of a dataset. Picklable as its store is."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def write_plan(self, plan: dict[str, Any]) -> None:
        """Records what is to be fetched, once.

        Raises:
            ValueError: the dataset has another plan, or the plan lacks "num_shards".
        """
        if not isinstance(plan.get("num_shards"), int):
            raise ValueError('a plan needs "num_shards"')
        data = json_bytes(plan)
        if not self.store.create("plan/plan.json", data):
            if self.store.read("plan/plan.json") != data:
                raise ValueError(
                    f"{self.store.url} was planned otherwise, and plans do not change; "
                    "choose another root for another source or shard size"
                )

    def read_plan(self) -> dict[str, Any]:
        """The plan, with the shards that further passes over failed rows appended to it.

        "num_shards" counts all shards, "list_shards" those of the list itself; "passes" are the
        records of the passes in order. Raises FileNotFoundError before `write_plan`.
        """
        plan = self._record("plan/plan.json", "num_shards", int)
        paths = [path for path in self.store.list(PASSES) if path.endswith(".json")]
        passes = [self._record(path, "num_shards", int) for path in paths]
        added = sum(again["num_shards"] for again in passes)
        shards = plan["num_shards"]
        return plan | {"num_shards": shards + added, "list_shards": shards, "passes": passes}

    def _record(self, path: str, name: str, kind: type) -> dict[str, Any]:
        """An object with such a field. Raises ValueError, naming the URL, for anything else."""
        value = self.store.read_json(path)
        if not isinstance(value, dict) or type(value.get(name)) is not kind:
            raise ValueError(f"{self.store.full(path)} tells no {name!r}")
        return value

    def stage_ids(self) -> list[str]:
        """Ids of all stages with at least one commit."""
        return sorted({path.split("/")[1] for path in self.store.list("commits/")})

    def committed(self, stage: Stage | str) -> set[int]:
        """Shards that are done, from one listing."""
        return set(self._numbered(f"commits/{_id(stage)}/"))

    def is_committed(self, stage: Stage | str, shard: int) -> bool:
        """Whether a shard is done, without a listing of all that are."""
        return self.store.exists(commit_path(_id(stage), shard))

    def commits(self, stage: Stage | str) -> dict[int, Commit]:
        """Shard -> commit of everything that is done.

        Raises:
            ValueError: a commit of another stage lies in this one's place.
        """
        return {commit.shard: commit for commit in self.each_commit(stage)}

    def each_commit(self, stage: Stage | str) -> Iterator[Commit]:
        """The commits of a stage in the order of shards, read ahead but never all held.

        Raises:
            ValueError: a commit of another stage lies in this one's place.
        """
        paths = self._numbered(f"commits/{_id(stage)}/")
        return streamed(lambda item: self._read(stage, item[1]), sorted(paths.items()))

    def read_commit(self, stage: Stage | str, shard: int) -> Commit:
        """One commit. Raises FileNotFoundError when the shard is not done."""
        try:
            return self._read(stage, commit_path(_id(stage), shard))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{_id(stage)} has not committed shard {shard}") from error

    def commit(
        self,
        stage: Stage,
        shard: int,
        data: ShardData,
        *,
        upstream_commits: Iterable[Commit] = (),
    ) -> Commit:
        """Publishes a shard; the first of several writers wins.

        Returns:
            The commit that stands: ours, or that of whoever was first.

        Raises:
            ValueError: outputs, keys and statuses do not agree; nothing is published.
            TornShard: an output is not a whole tar.
        """
        _check(stage, shard, data)
        name = shard_name(shard)
        outputs = {
            modality: self._put(f"shards/{stage.directory(modality)}/{name}", tar, "tar")
            for modality, tar in sorted(data.outputs.items())
        }
        rows = _status_parquet(shard, data)
        status = self._put(f"status/{stage.id}/{name}", rows, "parquet")
        commit = Commit(
            stage=stage.id,
            fingerprint=stage.fingerprint,
            shard=shard,
            outputs=outputs,
            status=status,
            samples=len(data.keys),
            key_digest=key_digest(data.keys),
            drops=count_drops(reason for _, reason, _ in data.statuses),
            seconds=round(data.seconds, 3),
            samples_per_second=round(len(data.keys) / max(data.seconds, 1e-6), 2),
            model=stage.model,
            revision=stage.revision,
            code_version=commit_hash(),
            run_id=_run(),
            upstream={
                f"{c.stage}/{c.shard}": {m: o["sha256"] for m, o in c.outputs.items()}
                for c in upstream_commits
            },
            created=_now(),
            info=data.info,
            waited=data.waited,
            queues=data.queues,
        )
        if self.store.create_json(commit_path(stage.id, shard), asdict(commit)):
            return commit
        return self.read_commit(stage, shard)

    def attempt(self, stage: Stage, shard: int) -> int:
        """Records that work on a shard begins; returns how often it has begun, this time included.

        Written before the work, so that it also counts attempts that kill their worker.
        """
        prefix = f"attempts/{stage.id}/{shard_name(shard)}."
        number = self.attempts(stage, shard) + 1
        record = {"created": _now(), "writer": uuid.uuid4().hex, "run": _run()}
        while not self.store.create_json(f"{prefix}{number}", record):
            # A lost answer is asked for again, and then says that the object, ours, exists.
            if self.store.read_json(f"{prefix}{number}") == record:
                break
            number += 1
        return number

    def attempts(self, stage: Stage, shard: int) -> int:
        """How often work on a shard has begun."""
        # Asked one by one: a listing takes as long as the stage has shards, for each of them.
        number = 0
        while self.store.exists(f"attempts/{stage.id}/{shard_name(shard)}.{number + 1}"):
            number += 1
        return number

    def attempts_of_run(self, stage: Stage, shard: int, after: int) -> int:
        """How often this run has begun with a shard, of the attempts after so many: another run
        at the same time counts its own."""
        prefix = f"attempts/{stage.id}/{shard_name(shard)}."
        numbers = range(after + 1, self.attempts(stage, shard) + 1)
        records = (self.store.read_json(f"{prefix}{number}") for number in numbers)
        return sum(record.get("run", _run()) == _run() for record in records)

    def begun(self, stage: Stage | str) -> Counter[int]:
        """Shard -> how often work on it has begun, from one listing."""
        paths = self.store.list(f"attempts/{_id(stage)}/")
        return Counter(int(path.rpartition("-")[2].partition(".")[0]) for path in paths)

    def quarantine(self, stage: Stage, shard: int, reason: str) -> None:
        """Sets a shard aside with the reason; `todo` leaves it out until `release`."""
        path = f"quarantine/{stage.id}/{shard_name(shard)}.json"
        self.store.write_json(path, {"reason": reason, "created": _now()})

    def quarantines(self) -> list[str]:
        """Ids of all stages with at least one shard set aside."""
        return sorted({path.split("/")[1] for path in self.store.list("quarantine/")})

    def quarantined(self, stage: Stage | str) -> dict[int, str]:
        """Shard -> reason of what was set aside, and no other run has committed since."""
        numbered = self._numbered(f"quarantine/{_id(stage)}/")
        done = self.committed(stage) if numbered else set()
        paths = sorted((shard, path) for shard, path in numbered.items() if shard not in done)
        reasons = streamed(lambda item: self._reason(item[1]), paths)
        found = zip((shard for shard, _ in paths), reasons, strict=True)
        return {shard: reason for shard, reason in found if reason is not None}

    def _reason(self, path: str) -> str | None:
        try:
            return str(self._record(path, "reason", str)["reason"])
        except FileNotFoundError:  # released since it was listed
            return None

    def release(self, stage: Stage | str, shard: int) -> None:
        """Forgets a shard's attempts and quarantine, so that it is tried again."""
        for path in self.store.list(f"attempts/{_id(stage)}/{shard_name(shard)}."):
            self.store.delete(path)
        self.store.delete(f"quarantine/{_id(stage)}/{shard_name(shard)}.json")

    def todo(self, stage: Stage, shards: Iterable[int]) -> list[int]:
        """What is left of `shards`, in their order: neither committed nor quarantined."""
        done = self.committed(stage) | set(self._numbered(f"quarantine/{stage.id}/"))
        return [shard for shard in shards if shard not in done]

    def open_output(self, stage: Stage, shard: int, modality: str) -> tuple[Path, str]:
        """A committed tar as a local file, and its sha256.

        Raises:
            FileNotFoundError: the shard is not committed.
            ValueError: the stage does not write the modality.
        """
        stage.directory(modality)
        output = self.read_commit(stage, shard).outputs[modality]
        return self.store.local(output["path"], output["sha256"]), output["sha256"]

    def statuses(self, stage: Stage | str) -> pa.Table:
        """One row for each sample of the committed shards: key, reason, detail, shard."""
        commits = self.commits(stage).values()
        tables = _parallel(lambda commit: read_statuses(self.store, commit), commits)
        # Stages of different age tell more or less of their samples.
        joined = pa.concat_tables(tables, promote_options="default") if tables else None
        return STATUS_SCHEMA.empty_table() if joined is None else joined

    def _numbered(self, prefix: str) -> dict[int, str]:
        """Shard number -> path of the records under a prefix."""
        paths = [p for p in self.store.list(prefix) if p.endswith(".json")]
        return {int(p.removesuffix(".json").rpartition("-")[2]): p for p in paths}

    def _read(self, stage: Stage | str, path: str) -> Commit:
        value = self.store.read_json(path)
        try:
            commit = Commit.from_dict(value)
        except ValueError as error:
            raise ValueError(f"{self.store.full(path)}: {error}") from error
        if isinstance(stage, Stage) and commit.fingerprint != stage.fingerprint:
            raise ValueError(f"{self.store.full(path)} is a commit of {commit.stage}")
        return commit

    def _put(self, stem: str, data: bytes, extension: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        path = f"{stem}.{digest[:12]}.{extension}"
        self.store.write(path, data)
        return {"path": path, "sha256": digest, "bytes": len(data)}


def commit_path(stage_id: str, shard: int) -> str:
    """Where a commit lies."""
    return f"commits/{stage_id}/{shard_name(shard)}.json"


def read_keys(tar: bytes, source: str) -> list[str]:
    """Ordered keys of a label tar or a token tar. Raises TornShard for a damaged one."""
    members = scan_tar(tar, source)
    if is_blocks(members):
        return BlockReader.from_bytes(tar, source).keys
    return member_keys(members, source)


def read_statuses(store: Store, commit: Commit, columns: Sequence[str] | None = None) -> pa.Table:
    """Statuses of one shard, one row for each sample; only some of the columns if so asked."""
    return read_table(store.read(commit.status["path"]), columns)


def count_drops(reasons: Iterable[str]) -> dict[str, int]:
    """Reason -> number of samples, "ok" left out."""
    return dict(sorted(Counter(reason for reason in reasons if reason != OK).items()))


def _check(stage: Stage, shard: int, data: ShardData) -> None:
    where = f"{stage.id} shard {shard}"
    if sorted(data.outputs) != sorted(stage.outputs):
        raise ValueError(f"{where}: outputs {sorted(data.outputs)}, not {sorted(stage.outputs)}")
    known = {key: reason for key, reason, _ in data.statuses}
    if len(known) != len(data.statuses) or len(set(data.keys)) != len(data.keys):
        raise ValueError(f"{where}: a key occurs twice")
    if uneven := [name for name, v in data.columns.items() if len(v) != len(data.statuses)]:
        raise ValueError(f"{where}: column {uneven[0]!r} has not a value for each status")
    kept = set(data.keys)
    if lost := [key for key, reason in known.items() if reason == OK and key not in kept]:
        raise ValueError(f"{where}: {lost[0]} is ok but has no output")
    if unknown := kept - known.keys():
        raise ValueError(f"{where}: {min(unknown)} has an output but no status")
    for modality, tar in data.outputs.items():
        found = read_keys(tar, f"{where} {modality}")
        if found != data.keys:
            difference = first_difference(found, data.keys)
            raise ValueError(f"{where}: {modality} has other keys than the shard: {difference}")


def first_difference(left: Sequence[str], right: Sequence[str]) -> str:
    """Where two lists of keys part, in words."""
    for at, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return f"sample {at} is {a} here and {b} there"
    return f"{len(left)} samples here and {len(right)} there"


def _status_parquet(shard: int, data: ShardData) -> bytes:
    columns = list(zip(*data.statuses, strict=True)) or [(), (), ()]
    table = pa.table([*map(list, columns), [shard] * len(data.statuses)], schema=STATUS_SCHEMA)
    for name, values in data.columns.items():
        table = table.append_column(name, values)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _parallel(call: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    return list(streamed(call, items))


def streamed(
    call: Callable[[_T], _R], items: Iterable[_T], readers: int = _READERS
) -> Iterator[_R]:
    """Results in order, of so many threads; at most `_AHEAD` of them are waiting at a time."""
    with ThreadPoolExecutor(readers) as pool:
        rest = iter(items)
        while batch := list(islice(rest, _AHEAD)):
            yield from pool.map(call, batch)


def _id(stage: Stage | str) -> str:
    return stage if isinstance(stage, str) else stage.id


def _run() -> str:
    return environ.get("FOURM_RUN_ID", "")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
