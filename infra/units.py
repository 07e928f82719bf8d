"""One unit of work: a shard of a stage, brought to commit or quarantine on whatever worker."""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NoReturn, Protocol, TypeVar

from infra.fitting import gpu_lost
from infra.ledger import MAX_ATTEMPTS, Commit, Ledger, ShardData, Stage
from infra.machine import keep_freed_memory
from infra.store import Store

log = logging.getLogger("fourm.runner")
T = TypeVar("T")

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
"""Of a disk that is full or cannot be written: no unit is to blame for it, and none succeeds."""
RETRY_SECONDS = 1.0
"""Wait before the second attempt of a failed unit; doubled before each further one."""


class SystemicFailure(RuntimeError):
    """Raised by a `Work` where no unit can succeed (no network, no weights, disk full).

    The run stops, the unit stays to do, and no attempt of other units is spent.
    """


class Work(Protocol):
    """The work of one stage, built once per worker: holds networks, connections, caches.

    An optional `close(self) -> None` is called before another stage's work is built. Works whose
    jobs may `share` a pass have `run_with(self, others, shard) -> list[ShardData]` too: one pass
    over a shard for itself and other works of its class, each with the bytes it makes alone.
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
    share: str = ""
    """Jobs of one name here do each shard in one pass, as far as it is to do for several of them;
    their works are held at once. Empty: alone."""
    turns: int = 0
    """Turns at a host that all workers of a run have together, see `infra.turns`; 0: it asks no
    hosts."""


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
    seconds: float = 0.0
    """Time of the work."""
    waited: str = "{}"
    """JSON: what the work waited for to seconds."""


class UnitRunner:
    """Runs units and keeps the work of the current stage; units of one stage may overlap.

    A unit that was under way when a worker died runs alone from then on: only who kills workers is
    charged with their deaths.

    Args:
        store: where inputs and the ledger lie.
        jobs: the stages that units refer to by position.
        threads: torch and OpenMP threads.
        replaced: whether another process takes over when this one ends. It does so where its GPU is
            lost; without another to take over the run stops.
    """

    def __init__(
        self, store: Store, jobs: list[StageJob], threads: int, *, replaced: bool = False
    ) -> None:
        self._replaced = replaced
        self._store, self._jobs, self._threads = store, jobs, threads
        self._ledger = Ledger(store)
        self._works: dict[int, Work] = {}
        self._halt = ""
        self._building = threading.Lock()
        self._running = _Running()
        keep_freed_memory()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Ray Data's side: a batch of one unit in, its status rows out."""
        rows = [vars(row) for row in self.run(int(batch["shard"][0]), str(batch["parts"][0]))]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the current works."""
        works, self._works = self._works, {}
        for work in works.values():
            close = getattr(work, "close", None)
            if close is not None:
                close()

    def run(self, shard: int, parts: str) -> list[UnitStatus]:
        """Bring one unit to its end; a status for each of its parts.

        Args:
            shard: shard number.
            parts: JSON: for each stage that shares the unit the position of its job, and the
                attempts made by earlier runs.
        """
        stages: list[tuple[int, int]] = [(job, before) for job, before in json.loads(parts)]
        done = self._guarded(stages[0][0], shard, lambda: self._together(shard, stages))
        if not isinstance(done, dict):
            return [done]
        return [
            done[job] if job in done
            else self._guarded(job, shard, partial(self._attempt, job, shard, before))
            for job, before in stages
        ]

    def _guarded(self, job: int, shard: int, call: Callable[[], T]) -> T | UnitStatus:
        try:
            if self._halt:
                raise SystemicFailure(self._halt)
            return call()
        except (SystemicFailure, OSError) as failure:
            # What a work raises is dealt with already: an OSError is the store's.
            name = "" if isinstance(failure, SystemicFailure) else f"{type(failure).__name__}: "
            self._halt = self._halt or f"{self._jobs[job].stage.name}: {name}{failure}"
            log.error("shard %d aborts the run: %s", shard, self._halt)
            return UnitStatus(job, shard, "aborted", reason=self._halt)

    def _together(self, shard: int, stages: list[tuple[int, int]]) -> dict[int, UnitStatus]:
        """One pass for several stages, once: what it does not commit, each of them tries alone."""
        jobs = [job for job, _ in stages]
        if len(jobs) == 1 or any(self._tried(job, shard, before) for job, before in stages):
            return {}
        try:
            with self._running.one(self._kind(jobs)):
                for job in jobs:
                    self._ledger.attempt(self._jobs[job].stage, shard)
                first, *others = self._works_of(jobs)
                made: list[ShardData] = first.run_with(others, shard)  # type: ignore[attr-defined]
        except SystemicFailure:
            raise
        except Exception:
            names = ", ".join(self._jobs[job].stage.name for job in jobs)
            log.exception("shard %d in one pass for %s; now each alone", shard, names)
            return {}
        done = {}
        for job, data in zip(jobs, made, strict=True):
            try:
                done[job] = self._commit(job, shard, data)
            except ValueError:
                log.exception("%s shard %d; now alone", self._jobs[job].stage.name, shard)
        return done

    def _commit(self, job: int, shard: int, data: ShardData) -> UnitStatus:
        stage = self._jobs[job].stage
        upstream = self._upstream(stage, shard)
        return _committed(job, self._ledger.commit(stage, shard, data, upstream_commits=upstream))

    def _attempt(self, job: int, shard: int, before: int) -> UnitStatus:
        reason = "the worker died each time it ran this shard (out of memory, or a crash)"
        pause = 0.0
        while True:
            time.sleep(pause)
            alone = self._tried(job, shard, before)
            with self._running.one(self._kind([job]), alone=alone):
                number = self._begin(job, shard, before)
                ended = self._once(job, shard, number, reason)
            if isinstance(ended, UnitStatus):
                return ended
            reason = ended
            pause = RETRY_SECONDS * 2 ** (number - 1) if number < MAX_ATTEMPTS else 0.0

    def _begin(self, job: int, shard: int, before: int) -> int:
        """The number of the attempt that begins, of those of this run."""
        stage = self._jobs[job].stage
        number = self._ledger.attempt(stage, shard) - before
        # Another run's, which may be cut off as often as it likes, are told apart where it matters.
        return number if number < 2 else self._ledger.attempts_of_run(stage, shard, before)

    def _once(self, job: int, shard: int, number: int, reason: str) -> UnitStatus | str:
        """The end of a unit, or why this attempt was none; the reason given is that of the last."""
        stage = self._jobs[job].stage
        if number > 1 and self._ledger.is_committed(stage, shard):
            # The worker died, or another run was faster, after the commit.
            return _committed(job, self._ledger.read_commit(stage, shard))
        if number > MAX_ATTEMPTS:
            reason = f"{MAX_ATTEMPTS} attempts failed: {reason}"
            self._ledger.quarantine(stage, shard, reason)
            return UnitStatus(job, shard, "quarantined", reason=reason)
        try:
            data = self._works_of([job])[0].run(shard)
        except SystemicFailure:
            raise
        except Exception as error:
            log.exception("%s shard %d, attempt %d", stage.name, shard, number)
            if gpu_lost(error):
                self._end(error)
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise
            return f"{type(error).__name__}: {error}"
        try:
            return self._commit(job, shard, data)
        except ValueError as error:
            # The work handed over outputs that do not agree; a failing store raises otherwise.
            return f"{type(error).__name__}: {error}"

    def _end(self, error: Exception) -> NoReturn:
        """End this process: whatever it tried with a lost GPU would fail, whosever fault it was."""
        if self._replaced:
            log.error("the GPU is lost to this worker, which ends: %s", error)
            logging.shutdown()
            os._exit(1)
        raise SystemicFailure(f"this process has lost its GPU, start it again: {error}") from error

    def _tried(self, job: int, shard: int, before: int) -> bool:
        """Whether this run began with it already, here or in a worker that died."""
        return self._ledger.attempts(self._jobs[job].stage, shard) > before

    def _kind(self, jobs: list[int]) -> str:
        """Units of one kind may overlap: they are for the same works, which meet at one lane. Of
        works that share a pass each has a lane of its own, too, where a shard lacks the others."""
        return " ".join(self._jobs[job].stage.id for job in jobs)

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

    def _works_of(self, jobs: list[int]) -> list[Work]:
        """Works of jobs that share a pass; others are let go of before the first is built."""
        with self._building:
            return self._held(jobs)

    def _held(self, jobs: list[int]) -> list[Work]:
        share = self._jobs[jobs[0]].share
        kept = all(share and self._jobs[job].share == share for job in self._works)
        if not kept and set(self._works) != set(jobs):
            self.close()
        for job in jobs:
            if job not in self._works:
                self._works[job] = self._build(self._jobs[job])
                _limit_torch(self._threads)
        return [self._works[job] for job in jobs]

    def _build(self, job: StageJob) -> Work:
        module, _, function = job.factory.partition(":")
        try:
            build = getattr(importlib.import_module(module), function)
            work: Work = build(self._store.url, job.stage, job.config)
        except Exception as error:
            log.exception("building the work of %s", job.stage.name)
            what = f"cannot build the work of {job.stage.name} ({job.factory})"
            raise SystemicFailure(f"{what}: {type(error).__name__}: {error}") from error
        return work


class _Running:
    """The units under way in this worker: several of one kind, or one that is to be alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._units, self._kind, self._alone = 0, "", False
        self._waiting = 0
        """Units that are to be alone, and wait for it: nobody else begins before them."""

    @contextmanager
    def one(self, kind: str, *, alone: bool = False) -> Iterator[None]:
        """One more is under way during the block; waits for those that it may not overlap."""
        with self._changed:
            self._waiting += alone
            try:
                self._changed.wait_for(partial(self._may_begin, kind, alone))
            finally:
                self._waiting -= alone
                self._changed.notify_all()
            self._units, self._kind, self._alone = self._units + 1, kind, alone
        try:
            yield
        finally:
            with self._changed:
                self._units -= 1
                self._changed.notify_all()

    def _may_begin(self, kind: str, alone: bool) -> bool:
        if alone or not self._units:
            return not self._units and (alone or not self._waiting)
        return not (self._alone or self._waiting or kind != self._kind)


def _committed(job: int, commit: Commit) -> UnitStatus:
    return UnitStatus(
        job, commit.shard, "committed", commit.samples, drops=json.dumps(commit.drops),
        seconds=commit.seconds, waited=json.dumps(commit.waited),
    )  # fmt: skip


def _limit_torch(threads: int) -> None:
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def worker_variables(
    threads: int, run_id: str, turns: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """Environment of a worker: OpenMP reads its threads when it loads, commits name the run, and
    turns at hosts are those of `infra.turns.keeper`."""
    return {
        **turns,
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
