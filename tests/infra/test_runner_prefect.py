"""Cancelling in Prefect ends the run as Cancelled, with no Ray process left and resumable."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from infra.ledger import Ledger
from infra.ray_session import Embedded
from infra.runner import Resources, run_stages
from infra.store import Store
from tests.infra.test_runner_cancel import toy_job

ROOT = Path(__file__).parents[2]


@pytest.mark.chaos
def test_cancelling_through_the_api_ends_cancelled_and_resumes(tmp_path):
    store = Store(str(tmp_path / "store"))
    quick, slow = toy_job(2, "label:quick"), toy_job(8, "label:slow")
    with ExitStack() as stack:
        api, environment = stack.enter_context(_server(tmp_path))
        script = Path(__file__).with_name("cancel_flow.py")
        server = stack.enter_context(_process([sys.executable, script, store.url], environment))
        found = _until(lambda: _post(api, "/deployments/filter", {}), 60, "the deployment")
        run = _post(api, f"/deployments/{found[0]['id']}/create_flow_run", {})
        _until(lambda: len(Ledger(store).committed(quick.stage)) == 2, 120, "the first commits")
        ray_processes = _ray_of(server)
        assert ray_processes
        state = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
        _post(api, f"/flow_runs/{run['id']}/set_state", state)
        ended = _until(lambda: _terminal(api, run["id"]), 60, "the end of the run")
        assert ended == ("CANCELLED", "Cancelled")
        _until(lambda: not _ray_of(server), 15, "the end of Ray")
        artifacts = _post(api, "/artifacts/filter", {})
        assert any(artifact["key"] == "labelling" for artifact in artifacts)
    assert Ledger(store).committed(slow.stage) == set()
    jobs = [quick, slow]
    reports = run_stages(store, jobs, target=Embedded(), resources=Resources(workers=0))
    assert [report.done for report in reports.values()] == [0, 8]


@contextmanager
def _server(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    api = f"http://127.0.0.1:{port}/api"
    environment = os.environ | {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": api,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    with _process(command, environment):
        _until(lambda: _healthy(api), 120, "the Prefect server")
        yield api, environment


@contextmanager
def _process(command: list[Any], environment: dict[str, str]) -> Iterator[psutil.Popen]:
    process = psutil.Popen(
        [str(part) for part in command], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        family = [*process.children(recursive=True), process]
        for member in family:
            if member.is_running():
                member.kill()
        psutil.wait_procs(family, timeout=10)


def _ray_of(process: psutil.Process) -> list[str]:
    commands = [_command(child) for child in process.children(recursive=True)]
    return [command for command in commands if "ray::" in command or "raylet" in command]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _healthy(api: str) -> bool:
    try:
        return httpx.get(f"{api}/health", timeout=2).is_success
    except httpx.HTTPError:
        return False


def _post(api: str, path: str, body: dict[str, Any]) -> Any:
    answer = httpx.post(f"{api}{path}", json=body, timeout=30)
    answer.raise_for_status()
    return answer.json()


def _terminal(api: str, run_id: str) -> tuple[str, str] | None:
    state = httpx.get(f"{api}/flow_runs/{run_id}", timeout=30).json()["state"]
    ended = state["type"] in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
    return (state["type"], state["name"]) if ended else None


def _until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.5)
    pytest.fail(f"{what} did not come within {seconds:g} s")
