"""Cancelled and killed runs leave nothing behind and resume to the same bytes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from infra.ledger import Ledger, Stage
from infra.ray_session import Embedded
from infra.runner import Resources, RunProgress, StageJob, run_stages
from infra.store import Store
from tests.infra.serving import alive, descendants

EMBEDDED = Embedded(num_cpus=2)
ROOT = Path(__file__).parents[2]


def toy_job(shards: int, name: str = "label:toy", **config: object) -> StageJob:
    stage = Stage(name=name, version=1, params={}, outputs=("toy",))
    return StageJob(stage, "tests.infra.runner_works:build", config, tuple(range(shards)))


def hashes(store: Store, job: StageJob) -> dict[int, str]:
    commits = Ledger(store).commits(job.stage)
    return {shard: commit.outputs["toy"]["sha256"] for shard, commit in commits.items()}


@pytest.mark.chaos
def test_interrupting_a_run_ends_its_ray_at_once_and_resumes(tmp_path, monkeypatch):
    began = 0.0

    def interrupt(now: RunProgress) -> None:
        nonlocal began
        began = time.monotonic()
        raise KeyboardInterrupt

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    store = Store(str(tmp_path / "store"))
    quick, slow = toy_job(1, "label:quick"), toy_job(4, "label:slow", seconds=120)
    before = set(descendants(psutil.Process()))
    with pytest.raises(KeyboardInterrupt):
        run_stages(
            store,
            [quick, slow],
            target=EMBEDDED,
            resources=Resources(workers=2),
            on_progress=interrupt,
        )
    assert time.monotonic() - began < 60, "the unit at hand takes as long: it was waited for"
    assert not [p for p in descendants(psutil.Process()) if p not in before and alive(p)]
    jobs = [quick, toy_job(4, "label:slow")]
    reports = run_stages(store, jobs, target=EMBEDDED, resources=Resources(workers=0))
    assert [report.done for report in reports.values()] == [0, 4]


DRIVER = """
import sys
from infra.store import Store
from infra.runner import Resources, run_stages
from tests.infra.test_runner_cancel import EMBEDDED, toy_job
run_stages(Store(sys.argv[1]), [toy_job(12, seconds=0.5)], target=EMBEDDED,
           resources=Resources(workers=2))
"""


@pytest.mark.chaos
def test_killing_the_driver_again_and_again_ends_in_the_same_bytes(tmp_path):
    store, undisturbed = Store(str(tmp_path / "store")), Store(str(tmp_path / "undisturbed"))
    job = toy_job(12)
    run_stages(undisturbed, [job], target=EMBEDDED, resources=Resources(workers=0))
    for commits in (1, 4, 7):
        _drive_and_kill(store, job.stage, commits)
    report = run_stages(store, [job], target=EMBEDDED, resources=Resources(workers=0))
    assert report[job.stage.id].skipped >= 7
    assert hashes(store, job) == hashes(undisturbed, job)
    assert Ledger(store).quarantined(job.stage) == {}


def _drive_and_kill(store: Store, stage: Stage, commits: int) -> None:
    """Run the driver in a process that is killed once there are that many commits."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, store.url], env=environment)
    deadline = time.monotonic() + 300
    while len(Ledger(store).committed(stage)) < commits:
        assert time.monotonic() < deadline, "the run makes no headway"
        assert driver.poll() is None, "the run ended before it was killed"
        time.sleep(0.05)
    driver.kill()
    driver.wait()
