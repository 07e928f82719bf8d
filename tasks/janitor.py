"""What may be removed from a dataset, and its removal.

    orphan       a shard or status object that no commit and no manifest names: its worker was
                 killed, or beaten by another
    attempt      the record of an attempt at a shard that has been committed since
    checkpoint   of a finished run, beyond the newest `KEEP`, or never completed
    job          what passed between a flow and its job on a cluster
    write        a temporary file or multipart upload of a writer that died

Only what is older than a given age counts: a young object may be about to be committed. What a
commit or a manifest names is never touched, and where one of them cannot be read no orphan is
removed at all. Quarantine, plans, commits, manifests, models and loss curves are no litter.
"""

from __future__ import annotations

import logging
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from infra.backends import Entry
from infra.ledger import Ledger
from infra.manifest import load_manifest, manifest_names, versions
from infra.store import Store
from tasks.run_store import KEEP

log = logging.getLogger("fourm.janitor")

LEAST_AGE = 3600.0
"""Seconds that anything is left alone: longer than any unit lies between data and commit."""

Kind = Literal["orphan", "attempt", "checkpoint", "job", "write"]
_CHECKPOINT = re.compile(r"^runs/(.+)/checkpoints/step-(\d+)/[^/]+$")
_ATTEMPT = re.compile(r"^attempts/([^/]+)/shard-(\d+)\.\d+$")
_JOB = re.compile(r"^jobs/([^/]+)/")


@dataclass(frozen=True)
class Litter:
    """One thing that may go."""

    kind: Kind
    path: str
    modified: float
    """When it was last written, POSIX seconds."""
    bytes: int = 0
    since: float = 0.0
    """When the youngest of what belongs together with it was written."""


def find_litter(store: Store, older_than: float, *, now: float | None = None) -> list[Litter]:
    """All litter of a dataset.

    Args:
        older_than: seconds since it was last written; at least `LEAST_AGE`.
        now: POSIX seconds; None for those of the store, whose clock tells the age of objects.

    Raises:
        ValueError: the age is too low.
    """
    if older_than < LEAST_AGE:
        raise ValueError(
            f"older_than={older_than:g} s: at least {LEAST_AGE:g} s, or work under way is lost"
        )
    before = (_now(store) if now is None else now) - older_than
    found = [*_orphans(store), *_attempts(store), *_checkpoints(store), *_jobs(store)]
    found += [Litter("write", name, begun) for name, begun in store.unfinished().items()]
    return [litter for litter in found if max(litter.modified, litter.since) < before]


def _now(store: Store) -> float:
    try:
        return store.now()
    except OSError:  # who may only read is told what there is, and can remove nothing
        return time.time()


def remove(store: Store, litter: Iterable[Litter]) -> int:
    """Remove litter, unless it has been written or named since it was found.

    Returns:
        How many things were removed.
    """
    litter = list(litter)
    named = named_objects(store) if any(item.kind == "orphan" for item in litter) else set()
    removed = 0
    for item in litter:
        if item.kind == "write":
            store.discard(item.path)
            removed += 1
    objects = (item for item in litter if item.kind != "write")
    for item in sorted(objects, key=_removal_order):
        if item.kind == "orphan" and (named is None or item.path in named):
            continue
        # Asked one by one, right before: a run that resumes may be making it again.
        now = store.entry(item.path)
        if now is not None and now.modified < item.modified + 1:  # some tell whole seconds
            store.delete(item.path)
            removed += 1
    return removed


def _removal_order(item: Litter) -> tuple[str, bool, str]:
    """By folder; of a checkpoint state.json first: without it the rest is none."""
    folder = item.path.rpartition("/")[0]
    return folder, not item.path.endswith("/state.json"), item.path


def _orphans(store: Store) -> Iterator[Litter]:
    # Objects first: what is committed after this listing is named by a commit that is read after.
    objects = {**store.entries("shards/"), **store.entries("status/")}
    named = named_objects(store)
    if named is None:
        return
    for path in sorted(objects.keys() - named):
        yield Litter("orphan", path, objects[path].modified, objects[path].size)


def named_objects(store: Store) -> set[str] | None:
    """Paths that a commit or a manifest names; None where one of them cannot be understood."""
    named: set[str] = set()
    ledger, record = Ledger(store), ""
    try:
        for record in ledger.stage_ids():
            for commit in ledger.each_commit(record):
                named.add(commit.status["path"])
                named.update(output["path"] for output in commit.outputs.values())
        for name in manifest_names(store):
            for version in versions(store, name):
                record = f"manifest {name} v{version}"
                for entry in load_manifest(store, name, version).entries.values():
                    named.update(output["path"] for output in entry["outputs"].values())
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
        log.warning("orphans are kept, since %s cannot be understood: %r", record, error)
        return None
    return named


def _attempts(store: Store) -> Iterator[Litter]:
    ledger = Ledger(store)
    committed: dict[str, set[int]] = {}
    for path, entry in store.entries("attempts/").items():
        match = _ATTEMPT.match(path)
        if match:
            stage, shard = match[1], int(match[2])
            if stage not in committed:
                committed[stage] = ledger.committed(stage)
            if shard in committed[stage]:
                yield Litter("attempt", path, entry.modified, entry.size)


def _checkpoints(store: Store) -> Iterator[Litter]:
    objects = store.entries("runs/")
    runs: dict[str, dict[int, dict[str, Entry]]] = defaultdict(lambda: defaultdict(dict))
    for path, entry in objects.items():
        if match := _CHECKPOINT.match(path):
            runs[match[1]][int(match[2])][path] = entry
    for run, steps in runs.items():
        complete = [step for step, files in sorted(steps.items()) if _is_complete(files)]
        finished = f"runs/{run}/run.json" in objects or _is_tokenizer(store, run)
        kept = set() if finished else set(complete[-KEEP:])
        for step in sorted(steps.keys() - kept):
            yield from _together("checkpoint", steps[step])


def _is_complete(files: Iterable[str]) -> bool:
    return any(path.endswith("/state.json") for path in files)


def _is_tokenizer(store: Store, run: str) -> bool:
    """Whether the run of a tokenizer has ended: its model lies under the tokenizer's own path."""
    if not run.startswith("tokenizers/"):
        return False
    from tasks.train_tokenizers import INFO

    return store.exists(f"{run}/{INFO}")


def _jobs(store: Store) -> Iterator[Litter]:
    jobs: dict[str, dict[str, Entry]] = defaultdict(dict)
    for path, entry in store.entries("jobs/").items():
        if match := _JOB.match(path):
            jobs[match[1]][path] = entry
    for files in jobs.values():
        yield from _together("job", files)


def _together(kind: Kind, files: Mapping[str, Entry]) -> Iterator[Litter]:
    """Files that go together or not at all: as old as the youngest of them."""
    youngest = max(entry.modified for entry in files.values())
    for path, entry in files.items():
        yield Litter(kind, path, entry.modified, entry.size, since=youngest)
