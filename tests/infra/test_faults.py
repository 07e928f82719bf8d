"""A store that fails in any way it can: the run ends in the same bytes, or says why and resumes."""

from __future__ import annotations

import errno
import os
import random
import tempfile
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import backends, units
from infra.ledger import Ledger, ShardData, Stage
from infra.runner import StageJob, SystemicFailure
from infra.store import Store
from infra.verify import verify
from tests.infra.fault_proxy import fault_proxy
from tests.infra.runner_works import ToyWork
from tests.infra.test_runner import hashes, run, toy_job


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(backends, "_PAUSES", (0.01,) * 3)


# --- S3 -----------------------------------------------------------------------------------------


@contextmanager
def faulty(s3_url: str, plan: Any, patience: float = 30) -> Iterator[tuple[Store, Store, Any]]:
    """The same dataset twice: through a proxy with faults, and directly."""
    url = f"{s3_url}/{uuid.uuid4().hex}"
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"], plan, stall=2 * patience) as proxy:
        options = {
            "endpoint_url": proxy.url,
            "config_kwargs": {"read_timeout": patience, "retries": {"max_attempts": 1}},
        }
        yield Store(url, options), Store(url), proxy


@pytest.mark.parametrize("fault", ["503", "500", "409", "reset", "lost", "cut"])
def test_a_service_that_often_fails_ends_in_the_same_bytes(s3_url, tmp_path, fault):
    draw, in_a_row = random.Random(fault), Counter()

    def plan(method: str, path: str, headers: Any) -> str:
        if fault == "409" and "If-None-Match" not in headers and "If-Match" not in headers:
            return ""
        fails = draw.random() < 0.25 and in_a_row[method, path] < 2
        in_a_row[method, path] = in_a_row[method, path] + 1 if fails else 0
        return fault if fails else ""

    job, undisturbed = toy_job(4), Store(str(tmp_path))
    run(undisturbed, job)
    with faulty(s3_url, plan) as (store, direct, proxy):
        report = run(store, job)[job.stage.id]
        assert (report.done, report.failed) == (4, 0)
        assert hashes(direct, job) == hashes(undisturbed, job)
        assert verify(direct, deep=True).ok
        assert proxy.counts[fault] > 0, "the test has tested nothing"


def test_a_service_that_stalls_is_asked_again(s3_url):
    stalls = [1]

    def plan(method: str, path: str, headers: Any) -> str:
        return "stall" if method == "PUT" and "commits" in path and stalls and stalls.pop() else ""

    with faulty(s3_url, plan, patience=2) as (store, direct, proxy):
        job = toy_job(2)
        assert run(store, job)[job.stage.id].done == 2
        assert verify(direct, deep=True).ok
        assert proxy.counts["stall"] == 1


def test_a_lost_answer_to_a_commit_ends_with_the_commit_that_stands(s3_url):
    """The client hears 412 about its own object, and must not take it for another's failure."""
    lost = [1]

    def plan(method: str, path: str, headers: Any) -> str:
        return "lost" if method == "PUT" and "commits" in path and lost and lost.pop() else ""

    with faulty(s3_url, plan) as (store, direct, proxy):
        job = toy_job(1)
        assert run(store, job)[job.stage.id].done == 1
        assert Ledger(direct).committed(job.stage) == {0}
        assert proxy.counts["lost"] == 1


def test_lost_answers_to_attempts_do_not_count_as_attempts(s3_url):
    lost = [1] * 5

    def plan(method: str, path: str, headers: Any) -> str:
        return "lost" if method == "PUT" and "attempts" in path and lost and lost.pop() else ""

    with faulty(s3_url, plan) as (store, *_):
        ledger, stage = Ledger(store), toy_job(1).stage
        assert [ledger.attempt(stage, 0) for _ in range(2)] == [1, 2]


def test_412_leaves_the_first_commit_standing(s3_url):
    job = toy_job(1)
    with faulty(s3_url, lambda *_: "") as (store, direct, _):
        run(direct, job)
        before = direct.read(f"commits/{job.stage.id}/shard-000000.json")
        Ledger(store).commit(job.stage, 0, ToyWork(job.stage, {}).run(0))
        assert direct.read(f"commits/{job.stage.id}/shard-000000.json") == before


def test_a_service_that_never_recovers_stops_the_run_in_words_and_it_resumes(s3_url):
    broken = threading.Event()

    def plan(method: str, path: str, headers: Any) -> str:
        return "503" if broken.is_set() and method == "PUT" else ""

    with faulty(s3_url, plan) as (store, direct, _):
        run(store, toy_job(1))
        broken.set()
        with pytest.raises(SystemicFailure, match=r"label:toy: \w*Error: .*(SlowDown|reduce)"):
            run(store, toy_job(4))
        assert verify(direct, deep=True).ok
        assert Ledger(direct).quarantined(toy_job(1).stage) == {}
        broken.clear()
        report = run(store, toy_job(4))[toy_job(1).stage.id]
        assert (report.done, report.skipped) == (3, 1)


def test_a_service_that_is_gone_is_an_os_error_that_names_the_store(s3_url):
    with faulty(s3_url, lambda *_: "reset") as (store, *_), pytest.raises(OSError, match=store.url):
        store.read("x")


# --- two runs on one dataset --------------------------------------------------------------------


def test_two_runs_that_race_leave_one_whole_result(tmp_store: Store):
    stage = Stage("label:toy", 1, {}, ("toy",))
    job = StageJob(stage, "tests.infra.runner_works:build", {"unsteady": True}, tuple(range(6)))

    def all_units(_: int) -> set[str]:
        runner = units.UnitRunner(Store(tmp_store.url), [job], threads=1)
        return {runner.run(shard, "[[0, 0]]")[0].state for shard in job.shards}

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(all_units, range(2))) == [{"committed"}] * 2
    assert Ledger(tmp_store).committed(stage) == set(range(6))
    report = verify(tmp_store, deep=True)
    assert report.ok, report.problems
    assert report.commits == 6
    assert Ledger(tmp_store).quarantined(stage) == {}


# --- a disk that fills up -----------------------------------------------------------------------


class FullDisk:
    """Lets so many bytes be written, then says ENOSPC in the middle of a file."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.open = Path.open

    def __call__(self, path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        handle = self.open(path, mode, *arguments, **options)
        if mode != "xb":
            return handle
        write = handle.write

        def limited(data: bytes) -> int:
            part = data[: self.room]
            self.room -= len(part)
            write(part)
            if len(part) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return len(part)

        return _Writer(handle, limited)


class _Writer:
    def __init__(self, handle: Any, write: Any) -> None:
        self.handle, self.write = handle, write

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.close()

    def flush(self) -> None:
        self.handle.flush()

    def fileno(self) -> int:
        return self.handle.fileno()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 40_000))
def test_a_disk_that_fills_up_at_any_byte_says_so_and_resumes(room: int) -> None:
    job = toy_job(3)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends.os, "fsync", lambda handle: None)
        store = Store(folder)
        said = ""
        with patch.context() as full:
            full.setattr(Path, "open", _as_method(FullDisk(room)))
            try:
                run(store, job)
            except SystemicFailure as error:
                said = str(error)
        whole = len(Ledger(store).committed(job.stage)) == 3
        assert whole or said.startswith("label:toy: OSError: [Errno 28] No space left on device")
        assert store.unfinished() == {}, "the room is free again"
        assert verify(store, deep=True).ok
        assert Ledger(store).quarantined(job.stage) == {}
        run(store, job)
        assert Ledger(store).committed(job.stage) == {0, 1, 2}
        assert verify(store, deep=True).ok


def _as_method(disk: FullDisk) -> Any:
    def open_(path: Path, *arguments: Any, **options: Any) -> Any:
        return disk(path, *arguments, **options)

    return open_


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_is_full_for_the_work_itself_stops_the_run(
    tmp_store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Such as for a copy out of S3: all shards would be quarantined for it."""
    job = toy_job(3)

    def full(self: object, shard: int) -> ShardData:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("tests.infra.runner_works.ToyWork.run", full)
        with pytest.raises(SystemicFailure, match=os.strerror(number)):
            run(tmp_store, job)
    assert Ledger(tmp_store).quarantined(job.stage) == {}
    run(tmp_store, job)
    assert Ledger(tmp_store).committed(job.stage) == {0, 1, 2}
