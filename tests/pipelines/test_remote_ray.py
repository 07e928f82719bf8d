"""Jobs on a real Ray head: done, found again, failed in words, and stopped with all they run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.ledger import Ledger
from infra.ray_jobs import JobFailed, JobsApi
from infra.ray_session import Job
from infra.runner import SystemicFailure
from infra.store import Store
from pipelines import remote
from pipelines.params import TokenizeParams
from tests.infra import ray_cluster
from tests.infra.serving import until
from tests.infra.test_runner import toy_job
from tests.pipelines.toy_stage import toy

pytestmark = [pytest.mark.slow, pytest.mark.chaos]
STAGE = toy.fn.__wrapped__


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """Address of the dashboard of a Ray head of its own, on the loopback."""
    with ray_cluster.head() as (_, dashboard):
        yield dashboard


def test_a_job_commits_on_the_clusters_own_ray_and_returns(head: str, tmp_path: Path) -> None:
    rows = remote.run(STAGE, _params(head, tmp_path, workers=1))
    job = toy_job(2)
    assert rows == [{"stage": job.stage.id, "done": 2}]
    assert Ledger(Store(str(tmp_path))).committed(job.stage) == {0, 1}


def test_a_failure_on_the_cluster_is_told_here(
    head: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SystemicFailure, match="nine crops are too many"):
        remote.run(STAGE, _params(head, tmp_path, crops=9))
    with pytest.raises(JobFailed, match="OSError: a hiccup"):
        remote.run(STAGE, _params(head, tmp_path, crops=10))
    told = [r.message for r in caplog.records if (r.name, r.levelname) == ("fourm.job", "ERROR")]
    assert any("fourm.job: job fourm-toy-" in line for line in told), "with its own level"


def test_a_second_follower_finds_the_job_and_stopping_ends_it(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    def first() -> None:
        try:
            remote.run(STAGE, _params(head, tmp_path, crops=12))
        except JobFailed as error:
            ended.append(str(error))

    follower = threading.Thread(target=first)
    follower.start()
    pid = int(until(lambda: _started(tmp_path), 600, "the job's own process"))

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(remote, "follow", interrupt)
    with pytest.raises(KeyboardInterrupt):
        remote.run(STAGE, _params(head, tmp_path, crops=12))
    until(lambda: not psutil.pid_exists(pid), 60, "the end of the job's process")
    follower.join(120)
    assert len(ended) == 1
    assert "-0 stopped" in ended[0], "both followed the same job"
    assert JobsApi(Job(address=head)).running() == {}


def _params(address: str, root: Path, crops: int = 4, workers: int = 0) -> TokenizeParams:
    return TokenizeParams(
        root=str(root), crops=crops, workers=workers, ray=Job(address=address)
    )


def _started(root: Path) -> str:
    path = root / "started"
    return path.read_text() if path.exists() else ""
