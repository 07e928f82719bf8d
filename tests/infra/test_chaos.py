"""Twenty rounds of killing driver, worker or raylet at random end in the bytes of a quiet run."""

from __future__ import annotations

import os
import random
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.ledger import Ledger, Stage
from infra.ray_session import Embedded
from infra.runner import Resources, run_stages
from infra.store import Store
from infra.verify import verify
from tests.infra.serving import command_of, descendants, end
from tests.infra.test_runner_cancel import hashes, toy_job

ROOT = Path(__file__).parents[2]
ROUNDS, SHARDS = 20, 300
PATIENCE = 300.0
"""Seconds that a round waits: for Ray to start on a busy machine, and for a run to end."""
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
    for number in range(ROUNDS):
        _round(store, job.stage, VICTIMS[number % 3], draw, tmp_path / f"round-{number}.log")
    report = run_stages(store, [job], target=Embedded(), resources=Resources(workers=0))
    assert report[job.stage.id].skipped >= ROUNDS
    assert hashes(store, job) == hashes(undisturbed, job)
    assert Ledger(store).committed(job.stage) == set(range(SHARDS))
    assert Ledger(store).quarantined(job.stage) == {}
    found = verify(store, deep=True)
    assert found.ok, found.problems


def _round(store: Store, stage: Stage, victim: str, draw: random.Random, log: Path) -> None:
    """Start a run, kill one of its processes at a random time, and see it end."""
    before = len(Ledger(store).committed(stage))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DRIVER, store.url]
    with log.open("wb") as output:
        driver = psutil.Popen(command, env=environment, stdout=output, stderr=output)
    family = {driver}
    try:
        _until_commits(store, stage, before + 1, driver, log)
        family |= set(driver.children(recursive=True))
        time.sleep(draw.uniform(0, 1))
        _kill(driver, victim)
        if victim == "worker":
            # The run goes on without it.
            _until_commits(store, stage, len(Ledger(store).committed(stage)) + 2, driver, log)
        else:
            # A driver without its raylet can do nothing more, and says so by its end.
            assert driver.wait(timeout=PATIENCE) != 0
    finally:
        end(family | set(descendants(driver)))


def _kill(driver: psutil.Popen, kind: str) -> None:
    """Kill the driver, or the first of its processes of that kind that is there to be killed."""
    if kind == "driver":
        return driver.kill()
    sign = {"worker": "UnitRunner", "raylet": "/raylet/raylet"}[kind]
    for child in descendants(driver):
        if sign in command_of(child):
            with suppress(psutil.NoSuchProcess):
                return child.kill()
    raise AssertionError(f"no {kind} is running")


def _until_commits(store: Store, stage: Stage, number: int, driver: Any, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(Ledger(store).committed(stage)) < number:
        said = log.read_text(errors="replace")[-3000:]
        assert driver.poll() is None, f"the run ended before it was killed: {said}"
        assert time.monotonic() < deadline, f"the run makes no headway: {said}"
        time.sleep(0.05)
