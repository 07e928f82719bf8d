"""Cancelling in Prefect ends the run as Cancelled, with no Ray process left and resumable."""

import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from infra.ledger import Ledger
from infra.ray_session import Embedded
from infra.runner import Resources, run_stages
from infra.store import Store
from tests.infra.serving import command_of, descendants, get, post, process, server, until
from tests.infra.test_runner_cancel import toy_job


@pytest.mark.chaos
def test_cancelling_through_the_api_ends_cancelled_and_resumes(tmp_path):
    store = Store(str(tmp_path / "store"))
    quick, slow = toy_job(2, "label:quick"), toy_job(8, "label:slow")
    with ExitStack() as stack:
        api, environment = stack.enter_context(server(tmp_path))
        script = Path(__file__).with_name("cancel_flow.py")
        serving = stack.enter_context(process([sys.executable, script, store.url], environment))
        found = until(lambda: post(api, "/deployments/filter", {}), 60, "the deployment")
        run = post(api, f"/deployments/{found[0]['id']}/create_flow_run", {})
        until(lambda: len(Ledger(store).committed(quick.stage)) == 2, 120, "the first commits")
        ray_processes = _ray_of(serving)
        assert ray_processes
        began = time.monotonic()
        state = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
        post(api, f"/flow_runs/{run['id']}/set_state", state)
        ended = until(lambda: _terminal(api, run["id"]), 120, "the end of the run")
        assert ended == ("CANCELLED", "Cancelled")
        assert time.monotonic() - began < 30
        until(lambda: not _ray_of(serving), 60, "the end of Ray")
        assert until(lambda: store.exists("hook") and store.read("hook"), 60, "the hook")
        artifacts = post(api, "/artifacts/filter", {})
        assert any(artifact["key"] == "labelling" for artifact in artifacts)
    assert Ledger(store).committed(slow.stage) == set()
    jobs = [quick, slow]
    reports = run_stages(store, jobs, target=Embedded(), resources=Resources(workers=0))
    assert [report.done for report in reports.values()] == [0, 8]


def _ray_of(process: psutil.Process) -> list[str]:
    commands = [command_of(child) for child in descendants(process)]
    return [command for command in commands if "ray::" in command or "raylet" in command]


def _terminal(api: str, run_id: str) -> tuple[str, str] | None:
    state = get(api, f"/flow_runs/{run_id}")["state"]
    ended = state["type"] in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
    return (state["type"], state["name"]) if ended else None
