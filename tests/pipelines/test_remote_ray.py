"""Jobs on a real Ray head: done, found again, failed in words, and stopped with all they run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra import ray_jobs
from infra.ledger import Ledger
from infra.ray_jobs import JobFailed, JobsApi
from infra.ray_session import Job
from infra.runner import SystemicFailure
from infra.store import Store
from pipelines import remote
from pipelines.params import TokenizeParams
from tests.infra.test_runner import toy_job
from tests.pipelines.toy_stage import toy

pytestmark = [pytest.mark.slow, pytest.mark.chaos]
ROOT = Path(__file__).resolve().parents[2]
STAGE = toy.fn.__wrapped__


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the dashboard of a Ray head of its own, on the loopback."""
    ports = [_free_port() for _ in range(3)]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += ["--node-ip-address=127.0.0.1", f"--port={ports[0]}", "--num-cpus=2"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1"]
    command += [f"--dashboard-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}"]
    command += [f"--temp-dir={tmp_path_factory.mktemp('ray')}", "--disable-usage-stats"]
    environment = {
        **os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    }  # fmt: skip
    process = psutil.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{ports[1]}"
    try:
        _until(lambda: _reachable(address), 240, "the dashboard")
        yield address
    finally:
        family = [*process.children(recursive=True), process]
        for member in family:
            if member.is_running():
                member.kill()
        psutil.wait_procs(family, timeout=15)


def test_a_job_commits_on_the_clusters_own_ray_and_returns(head: str, tmp_path: Path) -> None:
    rows = remote.run(STAGE, _params(head, tmp_path, workers=1))
    job = toy_job(2)
    assert rows == [{"stage": job.stage.id, "done": 2}]
    assert Ledger(Store(str(tmp_path))).committed(job.stage) == {0, 1}


def test_a_failure_on_the_cluster_is_told_here(head: str, tmp_path: Path) -> None:
    with pytest.raises(SystemicFailure, match="nine crops are too many"):
        remote.run(STAGE, _params(head, tmp_path, crops=9))
    with pytest.raises(JobFailed, match="OSError: a hiccup"):
        remote.run(STAGE, _params(head, tmp_path, crops=10))


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
    pid = int(_until(lambda: _started(tmp_path), 180, "the job's own process"))

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(remote, "follow", interrupt)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        remote.run(STAGE, _params(head, tmp_path, crops=12))
    _until(lambda: not psutil.pid_exists(pid), 30, "the end of the job's process")
    assert time.monotonic() - began < 30
    follower.join(60)
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


def _reachable(address: str) -> bool:
    try:
        return JobsApi(Job(address=address)).find("nothing") is None
    except (OSError, RuntimeError):
        return False


def _until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(ray_jobs.POLL_SECONDS / 4)
    pytest.fail(f"{what} did not come within {seconds:g} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
