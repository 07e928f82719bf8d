"""A hundred thousand shards: plan, resume and status stay quick and small on one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

MAKE = """
import dataclasses, os, sys
from pathlib import Path
from infra import backends
from infra.ledger import Ledger, commit_path
from infra.store import Store, json_bytes
from tests.infra.test_runner import run, toy_job

root, shards = sys.argv[1], int(sys.argv[2])
store, job = Store(root), toy_job(1)
Ledger(store).write_plan({"num_shards": shards})
run(store, job)
value = dataclasses.asdict(Ledger(store).read_commit(job.stage, 0))
# As a run would have left them, all but the last ten; plain writes, for the disk's sake.
for shard in range(1, shards - 10):
    path = Path(root) / commit_path(job.stage.id, shard)
    path.write_bytes(json_bytes(value | {"shard": shard}))
"""

MEASURE = """
import json, resource, sys, time
from infra.ledger import Ledger
from infra.runner import Resources, run_stages
from infra.ray_session import Embedded
from infra.status import status
from infra.store import Store
from tests.infra.test_runner import toy_job

root, shards = sys.argv[1], int(sys.argv[2])
began, job, store = time.process_time(), toy_job(int(sys.argv[2])), Store(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
todo = Ledger(store).todo(job.stage, job.shards)
report = run_stages(store, [job], target=Embedded(), resources=Resources(workers=0))
(line,) = status(store)
print(json.dumps({
    "todo": len(todo), "done": report[job.stage.id].done, "status": line.done,
    "seconds": time.process_time() - began,
    "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
}))
"""


def measure(root: Path, shards: int) -> dict[str, float]:
    """Resume and status of a dataset of which all but ten shards are committed, measured in a
    process of its own: CPU seconds, which busy neighbours do not lengthen, and memory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for program in (MAKE, MEASURE):
        done = subprocess.run(
            [sys.executable, "-c", program, str(root), str(shards)],
            env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict[str, float], shards: int, seconds: float, megabytes: float) -> None:
    assert (found["todo"], found["done"], found["status"]) == (10, 10, shards)
    assert found["seconds"] < seconds
    assert found["megabytes"] < megabytes


def test_two_thousand_shards_take_their_share_of_the_bounds(tmp_path: Path) -> None:
    check(measure(tmp_path / "data", 2_000), 2_000, seconds=20, megabytes=200)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_shards_take_a_minute_and_a_gigabyte(tmp_path: Path) -> None:
    check(measure(tmp_path / "data", 100_000), 100_000, seconds=60, megabytes=1_000)
