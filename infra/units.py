"""One unit of work: a shard of a stage, brought to commit or quarantine on whatever worker."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from infra.ledger import MAX_ATTEMPTS, Commit, Ledger, ShardData, Stage
from infra.machine import keep_freed_memory
from infra.store import Store

log = logging.getLogger("fourm.runner")

RETRY_SECONDS = 1.0
"""Wait before the second attempt of a failed unit; doubled before each further one."""


class SystemicFailure(RuntimeError):
    """Raised by a `Work` where no unit can succeed (no network, no weights, disk full).

    The run stops, the unit stays to do, and no attempt of other units is spent.
    """


class Work(Protocol):
    """The work of one stage, built once per worker: holds networks, connections, caches.

    An optional `close(self) -> None` is called before another stage's work is built.
    """

    def run(self, shard: int) -> ShardData:
        """Produce a shard whole. Raise for a unit that cannot be made."""
        ...


@dataclass(frozen=True)
class StageJob:
    """One stage over a list of shards."""

    stage: Stage
    factory: str
    """ "module:function", called as function(store_url, stage, config) -> Work on the worker."""
    config: dict[str, Any]
    """JSON; what the work needs and the fingerprint does not hold, such as a batch size."""
    shards: tuple[int, ...]
    at_once: int = 1
    """Shards that a worker may have under way at once: more where a unit mostly waits. The work's
    `run` is then called from several threads."""


State = Literal["committed", "quarantined", "aborted"]


@dataclass(frozen=True)
class UnitStatus:
    """The status row of a unit: all that a worker sends back."""

    job: int
    shard: int
    state: State
    samples: int = 0
    drops: str = "{}"
    """JSON: reason class to number."""
    reason: str = ""


class UnitRunner:
    """Runs units and keeps the work of the current stage; units of one stage may overlap.

    Args:
        store: where inputs and the ledger lie.
        jobs: the stages that units refer to by position.
        threads: torch and OpenMP threads.
    """

    def __init__(self, store: Store, jobs: list[StageJob], threads: int) -> None:
        self._store, self._jobs, self._threads = store, jobs, threads
        self._ledger = Ledger(store)
        self._current: int | None = None
        self._work: Work | None = None
        self._halt = ""
        self._building = threading.Lock()
        keep_freed_memory()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Ray Data's side: a batch of one unit in, its status row out."""
        unit = {name: int(column[0]) for name, column in batch.items()}
        return {name: [value] for name, value in vars(self.run(**unit)).items()}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the current work."""
        close = getattr(self._work, "close", None)
        self._work, self._current = None, None
        if close is not None:
            close()

    def run(self, job: int, shard: int, before: int) -> UnitStatus:
        """Bring one unit to its end.

        Args:
            job: position in jobs.
            shard: shard number.
            before: attempts made by earlier runs.
        """
        try:
            if self._halt:
                raise SystemicFailure(self._halt)
            return self._attempt(job, shard, before)
        except (SystemicFailure, OSError) as failure:
            # What a work raises is dealt with already: an OSError is the store's.
            name = "" if isinstance(failure, SystemicFailure) else f"{type(failure).__name__}: "
            self._halt = self._halt or f"{self._jobs[job].stage.name}: {name}{failure}"
            log.error("shard %d aborts the run: %s", shard, self._halt)
            return UnitStatus(job, shard, "aborted", reason=self._halt)

    def _attempt(self, job: int, shard: int, before: int) -> UnitStatus:
        stage = self._jobs[job].stage
        reason = "the worker died each time it ran this shard (out of memory, or a crash)"
        while True:
            number = self._ledger.attempt(stage, shard) - before
            if number > 1 and shard in self._ledger.committed(stage):
                # The worker died, or another run was faster, after the commit.
                return _committed(job, self._ledger.read_commit(stage, shard))
            if number > MAX_ATTEMPTS:
                reason = f"{MAX_ATTEMPTS} attempts failed: {reason}"
                self._ledger.quarantine(stage, shard, reason)
                return UnitStatus(job, shard, "quarantined", reason=reason)
            try:
                data = self._work_of(job).run(shard)
            except SystemicFailure:
                raise
            except Exception as error:
                log.exception("%s shard %d, attempt %d", stage.name, shard, number)
                reason = f"{type(error).__name__}: {error}"
                time.sleep(RETRY_SECONDS * 2 ** (number - 1) if number < MAX_ATTEMPTS else 0)
                continue
            upstream = self._upstream(stage, shard)
            try:
                commit = self._ledger.commit(stage, shard, data, upstream_commits=upstream)
            except ValueError as error:
                # The work handed over outputs that do not agree; a failing store raises otherwise.
                reason = f"{type(error).__name__}: {error}"
                continue
            return _committed(job, commit)

    def _upstream(self, stage: Stage, shard: int) -> list[Commit]:
        """What the shard was made from, as far as upstream stages work on the same shards; where
        one of them keeps nothing of it, what that one was made from."""
        found = []
        for upstream in stage.upstream:
            try:
                found.append(self._ledger.read_commit(upstream, shard))
            except FileNotFoundError:
                found += self._upstream(upstream, shard)
        return list({commit.stage: commit for commit in found}.values())

    def _work_of(self, job: int) -> Work:
        with self._building:
            return self._built(job)

    def _built(self, job: int) -> Work:
        if self._current != job or self._work is None:
            self.close()
            module, _, function = self._jobs[job].factory.partition(":")
            spec = self._jobs[job]
            try:
                build = getattr(importlib.import_module(module), function)
                self._work = build(self._store.url, spec.stage, spec.config)
            except Exception as error:
                log.exception("building the work of %s", spec.stage.name)
                what = f"cannot build the work of {spec.stage.name} ({spec.factory})"
                raise SystemicFailure(f"{what}: {type(error).__name__}: {error}") from error
            self._current = job
            _limit_torch(self._threads)
        return self._work


def _committed(job: int, commit: Commit) -> UnitStatus:
    return UnitStatus(
        job, commit.shard, "committed", commit.samples, drops=json.dumps(commit.drops)
    )


def _limit_torch(threads: int) -> None:
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def worker_variables(threads: int, run_id: str) -> dict[str, str]:
    """Environment of a worker: OpenMP reads its threads when it loads, commits name the run."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "FOURM_RUN_ID": run_id,
    }


@contextmanager
def as_worker(threads: int, run_id: str) -> Iterator[None]:
    """Make this process a worker for a while: its environment and torch's threads."""
    variables = worker_variables(threads, run_id)
    kept = {name: os.environ.get(name) for name in variables}
    torch = sys.modules.get("torch")
    torch_threads = torch.get_num_threads() if torch is not None else 0
    os.environ.update(variables)
    _limit_torch(threads)
    try:
        yield
    finally:
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        if torch_threads:
            _limit_torch(torch_threads)
