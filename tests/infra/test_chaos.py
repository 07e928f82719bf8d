"""Twenty rounds of killing driver, worker or raylet at random end in the bytes of a quiet run."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from infra.ledger import Ledger, Stage
from infra.ray_session import Embedded
from infra.runner import Resources, run_stages
from infra.store import Store
from infra.verify import verify
from tests.infra.test_runner_cancel import hashes, toy_job

ROOT = Path(__file__).parents[2]
ROUNDS, SHARDS = 20, 300
VICTIMS = ("driver", "worker", "raylet")

DRIVER = f"""
import sys
from infra.ray_session import Embedded
from infra.runner import Resources, run_stages
from infra.store import Store
from tests.infra.test_runner_cancel import toy_job
run_stages(Store(sys.argv[1]), [toy_job({SHARDS}, seconds=0.3)], target=Embedded(num_cpus=2),
           resources=Resources(workers=2))
"""


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killing_anything_twenty_times_leaves_no_hole_and_no_duplicate(tmp_path):
    store, undisturbed = Store(str(tmp_path / "store")), Store(str(tmp_path / "undisturbed"))
    job, draw = toy_job(SHARDS), random.Random(20)
    run_stages(undisturbed, [job], target=Embedded(), resources=Resources(workers=0))
    killed = [_round(store, job.stage, VICTIMS[number % 3], draw) for number in range(ROUNDS)]
    assert set(killed) == set(VICTIMS)
    report = run_stages(store, [job], target=Embedded(), resources=Resources(workers=0))
    assert report[job.stage.id].skipped >= ROUNDS
    assert hashes(store, job) == hashes(undisturbed, job)
    assert Ledger(store).committed(job.stage) == set(range(SHARDS))
    assert Ledger(store).quarantined(job.stage) == {}
    found = verify(store, deep=True)
    assert found.ok, found.problems


def _round(store: Store, stage: Stage, victim: str, draw: random.Random) -> str:
    """Start a run, kill one of its processes at a random time, and see it end."""
    before = len(Ledger(store).committed(stage))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    driver = psutil.Popen(
        [sys.executable, "-c", DRIVER, store.url], env=environment, stderr=subprocess.DEVNULL
    )
    family = {driver}
    try:
        _until_commits(store, stage, before + 1, driver)
        family |= set(driver.children(recursive=True))
        time.sleep(draw.uniform(0, 1))
        _victim(driver, victim).kill()
        if victim == "worker":
            # The run goes on without it.
            _until_commits(store, stage, len(Ledger(store).committed(stage)) + 2, driver)
    finally:
        for process in family | set(_children(driver)):
            if process.is_running():
                process.kill()
        psutil.wait_procs(family, timeout=30)
    return victim


def _victim(driver: psutil.Process, kind: str) -> psutil.Process:
    if kind == "driver":
        return driver
    sign = {"worker": "UnitRunner", "raylet": "/raylet/raylet"}[kind]
    found = [child for child in _children(driver) if sign in _command(child)]
    assert found, f"no {kind} is running"
    return found[0]


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _until_commits(store: Store, stage: Stage, number: int, driver: psutil.Process) -> None:
    deadline = time.monotonic() + 180
    while len(Ledger(store).committed(stage)) < number:
        assert time.monotonic() < deadline, "the run makes no headway"
        assert driver.is_running(), "the run ended before it was killed"
        time.sleep(0.05)
