"""On Ray every unit ends as it does in the process itself, whatever becomes of its worker."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from infra import ray_session, units
from infra.ledger import Ledger
from infra.ray_session import Existing
from infra.runner import Resources, SystemicFailure, run_stages
from infra.store import Store
from tests.infra.test_runner import EMBEDDED, hashes, run, toy_job

pytestmark = pytest.mark.usefixtures("_ray")


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch):
    monkeypatch.setattr(units, "RETRY_SECONDS", 0.0)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture(scope="module")
def _importable():
    """Workers import the works of these tests from this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        yield


@pytest.fixture(scope="module")
def _ray(_importable):
    previous = signal.getsignal(signal.SIGTERM)
    with ray_session.ray_session(EMBEDDED):
        yield
    assert signal.getsignal(signal.SIGTERM) is previous


@pytest.mark.parametrize("workers", [1, 2])
def test_ray_writes_the_same_bytes_as_this_process(tmp_path, workers):
    jobs = [toy_job(3, "label:a"), toy_job(3, "label:b")]
    here, there = Store(str(tmp_path / "here")), Store(str(tmp_path / "there"))
    run(here, *jobs)
    reports = run(there, *jobs, resources=Resources(workers=workers))
    assert [report.done for report in reports.values()] == [3, 3]
    assert [hashes(here, job) for job in jobs] == [hashes(there, job) for job in jobs]


def test_a_unit_that_kills_its_worker_is_quarantined_and_the_run_completes(store):
    job = toy_job(6, kill=[2], fail=[4])
    report = run(store, job, resources=Resources(workers=2))[job.stage.id]
    assert report.done == 4
    assert "the worker died" in report.quarantined[2]
    assert "shard 4 is broken" in report.quarantined[4]


def test_systemic_failure_on_ray_aborts_without_commit_or_quarantine(store):
    job = toy_job(8, systemic=list(range(8)))
    with pytest.raises(SystemicFailure, match="network is down"):
        run(store, job, resources=Resources(workers=2))
    ledger = Ledger(store)
    assert (ledger.committed(job.stage), ledger.quarantined(job.stage)) == (set(), {})


def test_more_workers_than_cores_are_cut_and_too_large_ones_refused(store):
    job = toy_job(2)
    with pytest.raises(ValueError, match="occupies 9 CPU and Ray has 2: lower its num_cpus"):
        run(store, job, resources=Resources(workers=1, num_cpus=9))
    with pytest.raises(ValueError, match=r"occupies 99 GPU and torch finds .* on this machine"):
        run(store, job, resources=Resources(workers=1, num_gpus=99))
    assert run(store, job, resources=Resources(workers=9, num_cpus=2))[job.stage.id].done == 2


def test_a_unit_beside_one_that_kills_its_worker_is_not_quarantined_with_it(store):
    job = toy_job(4, kill=[0], linger=0.5, seconds=1.0)
    report = run(store, replace(job, at_once=2), resources=Resources(workers=1))[job.stage.id]
    assert report.done == 3
    assert set(report.quarantined) == {0}


def test_on_a_cluster_workers_and_their_cores_follow_its_nodes(store, caplog):
    def ran(**asked: int | None) -> int:
        job = toy_job(4, f"label:{len(Ledger(store).stage_ids())}", threads=True)
        reports = run_stages(store, [job], target=Existing(), resources=Resources(**asked))
        told = [commit.info["threads"] for commit in Ledger(store).commits(job.stage).values()]
        assert reports[job.stage.id].done == len(told) == 4
        (threads,) = set(told)
        return threads

    assert ran(workers=None, threads=0) == 1
    assert ran(workers=1, threads=0) == 2
    assert "room for" not in caplog.text
    assert ran(workers=3, threads=0) == 1
    assert "room for 2 of 3 workers as yet" in caplog.text


