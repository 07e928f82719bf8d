"""Every unit ends committed or quarantined, with the same bytes however it is run."""

import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest

from infra import ray_session, units
from infra.ledger import MAX_ATTEMPTS, Ledger, ShardData, Stage
from infra.ray_session import Embedded
from infra.runner import Resources, RunProgress, StageJob, SystemicFailure, run_stages
from infra.store import Store
from infra.units import UnitRunner, UnitStatus, _Running
from tests.infra.runner_works import ROWS

EMBEDDED = Embedded(num_cpus=2)
HERE = Resources(workers=0)


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch):
    monkeypatch.setattr(units, "RETRY_SECONDS", 0.0)


def toy_job(shards: int = 4, name: str = "label:toy", **config: object) -> StageJob:
    stage = Stage(name=name, version=1, params={}, outputs=("toy",))
    return StageJob(stage, "tests.infra.runner_works:build", config, tuple(range(shards)))


def run(store: Store, *jobs: StageJob, resources: Resources = HERE, **keywords: object):
    return run_stages(store, list(jobs), target=EMBEDDED, resources=resources, **keywords)


def hashes(store: Store, job: StageJob) -> dict[int, str]:
    commits = Ledger(store).commits(job.stage)
    return {shard: commit.outputs["toy"]["sha256"] for shard, commit in commits.items()}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "store"))


def test_all_shards_are_committed_and_counted(store):
    job, seen = toy_job(4), []
    report = run(store, job, on_progress=seen.append)[job.stage.id]
    assert (report.done, report.skipped, report.failed) == (4, 0, 0)
    assert report.samples == 4 * ROWS
    assert report.drops == {"http_404": 4}
    assert Ledger(store).committed(job.stage) == {0, 1, 2, 3}
    assert [now.done for now in seen] == [1, 2, 3, 4]
    assert seen[-1].eta == 0
    assert "4/4 shards" in seen[-1].text


def test_what_the_work_waits_for_is_told_while_it_runs_and_stays_in_the_commits(store):
    job, seen = toy_job(4, waited={"input": 0.025, "output": 0.0}), []
    report = run(store, job, on_progress=seen.append)[job.stage.id]
    assert report.waits == pytest.approx({"input": 0.25, "output": 0.0})
    assert "waited for input 25 %, output 0 %" in seen[1].text
    assert Ledger(store).read_commit(job.stage, 3).waited == {"input": 0.025, "output": 0.0}
    plain = toy_job(4, "label:plain")
    run(store, plain, on_progress=seen.append)
    assert "waited" not in seen[-1].text


def test_resume_runs_only_what_is_missing(store, tmp_path):
    run(store, toy_job(2))
    job = toy_job(4, log=True, folder=str(tmp_path))
    report = run(store, job)[job.stage.id]
    assert (report.done, report.skipped) == (2, 2)
    assert (tmp_path / "log").read_text().split("\n")[1:3] == ["label:toy run 2", "label:toy run 3"]


def test_nothing_to_do_does_not_start_ray(store, monkeypatch):
    job = toy_job(2)
    run(store, job)
    monkeypatch.setattr(ray_session, "_init", pytest.fail)
    report = run(store, job, resources=Resources(workers=2))[job.stage.id]
    assert (report.done, report.skipped) == (0, 2)


def test_a_hiccup_is_retried(store, tmp_path):
    job = toy_job(2, fail_once=[1], folder=str(tmp_path))
    assert run(store, job)[job.stage.id].done == 2


def test_a_failing_unit_is_quarantined_with_its_reason(store):
    job = toy_job(3, fail=[1])
    report = run(store, job)[job.stage.id]
    assert (report.done, report.failed) == (2, 1)
    assert "ValueError: shard 1 is broken" in report.quarantined[1]
    assert "shard 1 is broken" in Ledger(store).quarantined(job.stage)[1]
    again = run(store, job)[job.stage.id]
    assert (again.done, again.skipped, again.failed) == (0, 2, 0)
    assert again.quarantined.keys() == {1}


def test_systemic_failure_aborts_without_commit_or_quarantine(store):
    job = toy_job(4, systemic=[1])
    with pytest.raises(SystemicFailure, match="network is down"):
        run(store, job)
    ledger = Ledger(store)
    assert ledger.committed(job.stage) == {0}
    assert ledger.quarantined(job.stage) == {}
    assert run(store, toy_job(4))[job.stage.id].done == 3


def test_a_work_that_cannot_be_built_is_systemic_and_named(store):
    match = r"label:toy \(tests.infra.runner_works:build\).*no weights"
    with pytest.raises(SystemicFailure, match=match):
        run(store, toy_job(1, unbuildable=True))


def test_a_store_that_fails_is_systemic(store, monkeypatch):
    def fail(*args: object, **keywords: object) -> None:
        raise PermissionError("read-only bucket")

    monkeypatch.setattr(Ledger, "commit", fail)
    job = toy_job(3)
    with pytest.raises(SystemicFailure, match="label:toy: PermissionError: read-only bucket"):
        run(store, job)
    assert Ledger(store).quarantined(job.stage) == {}


def test_outputs_that_do_not_agree_quarantine_the_unit(store, monkeypatch):
    def torn(self: object, shard: int) -> ShardData:
        return ShardData(keys=["a"], outputs={"toy": b""}, statuses=[("a", "ok", "")], seconds=1)

    monkeypatch.setattr("tests.infra.runner_works.ToyWork.run", torn)
    job = toy_job(1)
    assert run(store, job)[job.stage.id].quarantined.keys() == {0}


def test_commits_name_their_upstream_and_run(store, monkeypatch):
    monkeypatch.setenv("FOURM_RUN_ID", "run-7")
    first = toy_job(1, "fetch")
    stage = Stage("label:toy", 1, {}, ("toy",), upstream=(first.stage,))
    run(store, first, StageJob(stage, first.factory, {}, (0,)))
    commit = Ledger(store).read_commit(stage, 0)
    assert commit.run_id == "run-7"
    assert commit.upstream.keys() == {f"{first.stage.id}/0"}


def test_interrupting_often_quarantines_nothing(store, monkeypatch):
    job = toy_job(2)
    for _ in range(MAX_ATTEMPTS + 2):
        with monkeypatch.context() as patch:
            patch.setattr("tests.infra.runner_works.ToyWork.run", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(store, job)
    assert run(store, job)[job.stage.id].done == 2


def test_another_run_that_is_cut_off_often_quarantines_nothing(store, monkeypatch):
    job = toy_job(1)
    runner = UnitRunner(store, [job], threads=1)
    monkeypatch.setenv("FOURM_RUN_ID", "another")
    for _ in range(MAX_ATTEMPTS + 1):
        Ledger(store).attempt(job.stage, 0)
    monkeypatch.setenv("FOURM_RUN_ID", "this")
    assert [row.state for row in runner.run(0, "[[0, 0]]")] == ["committed"]


def test_a_worker_keeps_one_work_and_closes_it(store, tmp_path):
    config = {"log": True, "folder": str(tmp_path)}
    run(store, toy_job(2, "label:a", **config), toy_job(2, "label:b", **config))
    lines = (tmp_path / "log").read_text().split("\n")[:-1]
    steps = ["build", "run 0", "run 1", "close"]
    assert lines == [f"label:{name} {step}" for name in "ab" for step in steps]


def test_threads_are_limited_during_the_run_alone(store, monkeypatch):
    import torch

    before, seen = torch.get_num_threads(), []
    original = sys.modules["tests.infra.runner_works"].ToyWork.run

    def spy(self, shard):
        seen.append(torch.get_num_threads())
        return original(self, shard)

    monkeypatch.setattr("tests.infra.runner_works.ToyWork.run", spy)
    run(store, toy_job(1), resources=Resources(workers=0, threads=before + 1))
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def _interrupt(self: object, shard: int) -> None:
    raise KeyboardInterrupt


# --- stages that share a pass -------------------------------------------------------------------


def sharing(tmp_path: Path, **config: object) -> list[StageJob]:
    options = {"log": True, "folder": str(tmp_path), **config}
    jobs = [toy_job(3, f"label:{name}", **options) for name in "ab"]
    return [replace(job, share="a+b") for job in jobs]


def log_of(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().splitlines()


def test_a_shared_pass_leaves_what_separate_ones_leave(store, tmp_path):
    jobs = sharing(tmp_path)
    seen: list[RunProgress] = []
    reports = run(store, *jobs, on_progress=seen.append)
    assert [report.done for report in reports.values()] == [3, 3]
    assert (seen[-1].done, seen[-1].total) == (6, 6)
    assert [line for line in log_of(tmp_path) if "with" in line] == [
        f"label:a with 1 others {shard}" for shard in range(3)
    ]
    other = Store(str(tmp_path / "other"))
    run(other, *(replace(job, share="") for job in jobs))
    assert [hashes(store, job) for job in jobs] == [hashes(other, job) for job in jobs]


def test_where_one_stage_is_done_only_the_other_runs(store, tmp_path):
    first, second = sharing(tmp_path)
    run(store, replace(first, share="", shards=(1,)))
    (tmp_path / "log").unlink()
    reports = run(store, first, second)
    assert (reports[first.stage.id].done, reports[first.stage.id].skipped) == (2, 1)
    assert reports[second.stage.id].done == 3
    assert sorted(line for line in log_of(tmp_path) if line.endswith(" 1")) == ["label:b run 1"]


def test_a_shared_pass_that_fails_is_taken_apart(store, tmp_path):
    jobs = sharing(tmp_path, alone=True)
    jobs[1] = replace(jobs[1], config={**jobs[1].config, "fail": [2]})
    reports = run(store, *jobs)
    assert [report.done for report in reports.values()] == [3, 2]
    assert "shard 2 is broken" in reports[jobs[1].stage.id].quarantined[2]
    assert len([line for line in log_of(tmp_path) if line == "label:b run 2"]) == MAX_ATTEMPTS - 1


def test_a_pass_that_killed_its_worker_is_not_shared_again(store, tmp_path):
    first, second = sharing(tmp_path)
    for job in (first, second):  # as a worker that died leaves it
        Ledger(store).attempt(job.stage, 0)
    runner = UnitRunner(store, [first, second], threads=1)
    assert [row.state for row in runner.run(0, "[[0, 0], [1, 0]]")] == ["committed"] * 2
    assert not [line for line in log_of(tmp_path) if "with" in line]


def test_works_that_share_are_built_once_and_closed_before_others(store, tmp_path):
    run(store, *sharing(tmp_path), toy_job(1, "label:c", log=True, folder=str(tmp_path)))
    noted = [line for line in log_of(tmp_path) if "build" in line or "close" in line]
    assert noted == [
        "label:a build", "label:b build", "label:a close", "label:b close", "label:c build",
        "label:c close",
    ]  # fmt: skip


def test_a_lost_gpu_ends_its_worker_and_where_nobody_takes_over_the_run(store, monkeypatch):
    """Tried again in the same process it would fail whatever shard came next."""
    class Ended(BaseException):
        pass

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(units.os, "_exit", end)
    job = toy_job(3, lost_gpu=[0])
    with pytest.raises(Ended):
        UnitRunner(store, [job], threads=1, replaced=True).run(0, "[[0, 0]]")
    assert Ledger(store).attempts(job.stage, 0) == 1
    with pytest.raises(SystemicFailure, match=r"has lost its GPU.*device-side assert"):
        run(store, job)
    assert Ledger(store).quarantined(job.stage) == {}


# --- units that overlap in a worker ---------------------------------------------------------------


def beside(runner: UnitRunner, *units: tuple[int, str]) -> list[list[UnitStatus]]:
    """What becomes of units that begin together in a worker."""
    with ThreadPoolExecutor(len(units)) as pool:
        return [done.result(120) for done in [pool.submit(runner.run, *unit) for unit in units]]


def test_units_of_a_stage_overlap_in_a_worker(store):
    job = toy_job(2, meeting=threading.Barrier(2))
    runner = UnitRunner(store, [job], threads=1)
    done = beside(runner, (0, "[[0, 0]]"), (1, "[[0, 0]]"))
    assert [row.state for (row,) in done] == ["committed"] * 2


def test_no_work_is_let_go_of_under_a_unit_of_it(store, tmp_path):
    jobs = [toy_job(2, f"label:{name}", log=True, ends=True, folder=str(tmp_path), seconds=0.1)
            for name in "ab"]  # fmt: skip
    runner = UnitRunner(store, jobs, threads=1)
    done = beside(runner, *((shard, f"[[{job}, 0]]") for shard in (0, 1) for job in (0, 1)))
    assert [row.state for (row,) in done] == ["committed"] * 4
    within = Counter[str]()
    for line in log_of(tmp_path):
        name, what, *_ = line.split()
        within[name] += {"run": 1, "end": -1}.get(what, 0)
        assert what != "close" or not within[name], log_of(tmp_path)


def test_units_that_were_under_way_when_a_worker_died_run_alone(store, tmp_path):
    job = toy_job(3, log=True, ends=True, folder=str(tmp_path), seconds=0.1)
    for shard in (0, 1):
        Ledger(store).attempt(job.stage, shard)
    runner = UnitRunner(store, [job], threads=1)
    done = beside(runner, *((shard, "[[0, 0]]") for shard in (0, 1, 2)))
    assert [row.state for (row,) in done] == ["committed"] * 3
    said = [line.split()[1:] for line in log_of(tmp_path) if "build" not in line]
    assert [what for what, _ in said] == ["run", "end"] * 3


def test_a_unit_that_is_to_be_alone_goes_before_those_that_come_later():
    running, order = _Running(), list[str]()

    def one(name: str, alone: bool) -> None:
        with running.one("kind", alone=alone):
            order.append(name)

    def until_waiting(threads: int) -> None:
        deadline = time.monotonic() + 60
        while len(running._changed._waiters) < threads and not order:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    with ThreadPoolExecutor(2) as pool:
        with running.one("kind"):
            pool.submit(one, "alone", True)
            until_waiting(1)
            pool.submit(one, "later", False)
            until_waiting(2)
    assert order == ["alone", "later"]


def test_a_shard_that_lacks_one_of_shared_works_overlaps_with_no_pass_of_all(store, tmp_path):
    runner = UnitRunner(store, sharing(tmp_path, ends=True, seconds=0.1), threads=1)
    beside(runner, (0, "[[0, 0], [1, 0]]"), (1, "[[1, 0]]"))
    shards = [line.split()[-1] for line in log_of(tmp_path) if "build" not in line]
    assert [shard for shard, _ in groupby(shards)] in (["0", "1"], ["1", "0"])


