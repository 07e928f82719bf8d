"""Deployments of prefect.yaml for real: a server, a process worker, and a Ray cluster of two nodes
that the runs hand their work to as jobs."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from PIL import Image

from infra.automations import set_up
from infra.ledger import Ledger
from infra.ray_jobs import JobsApi
from infra.ray_session import Job
from infra.store import Store
from infra.verify import verify
from tests.infra.ray_cluster import ENVIRONMENT, head, node
from tests.infra.serving import ROOT, descendants, end, get, post, process, server, until

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(1800)]
ROWS, SHARD_ROWS = 8, 4


class Place(NamedTuple):
    """Where the tests' runs take place."""

    api: str
    environment: dict[str, str]
    dashboard: str


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """All deployments on a server, and two nodes with one core each; no worker yet."""
    folder = tmp_path_factory.mktemp("prefect")
    with head(cpus=1) as (address, dashboard), node(address), server(folder) as (api, env):
        env |= {"FOURM_HOME": str(ROOT), "PATH": ENVIRONMENT["PATH"]}
        env |= {"PREFECT_WORKER_QUERY_SECONDS": "2"}
        for words in (["work-pool", "create", "local-process", "--type", "process"],
                      ["deploy", "--all"]):  # fmt: skip
            command = [sys.executable, "-m", "prefect", "--no-prompt", *words]
            done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
        yield Place(api, env, dashboard)


@contextmanager
def worker(place: Place) -> Iterator[psutil.Popen]:
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "local-process"]
    with process(command, place.environment) as started:
        yield started


class Pictures(ThreadingHTTPServer):
    """Delivers a picture for every number once the gate is open."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.gate, self.asked = threading.Event(), set[int]()

    @property
    def host(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients are killed on purpose here."""


class _Answer(BaseHTTPRequestHandler):
    server: Pictures

    def do_GET(self) -> None:
        number = int(self.path.strip("/"))
        self.server.asked.add(number)
        self.server.gate.wait(1200)
        body = io.BytesIO()
        Image.new("RGB", (64, 64), (30 * number, 100, 0)).save(body, "PNG")
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.end_headers()
        self.wfile.write(body.getvalue())

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""


@pytest.fixture
def pictures() -> Iterator[Pictures]:
    served = Pictures()
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served
    served.gate.set()
    served.shutdown()
    served.server_close()


def start(place: Place, root: Path, pictures: Pictures) -> str:
    """Trigger the deployment ingest/cc12m through the API, its stages to be jobs; the run's id."""
    source = root / "list.tsv"
    source.write_text("".join(f"http://{pictures.host}/{n}\tnumber {n}\n" for n in range(ROWS)))
    params = {
        "root": str(root / "data"), "source": str(source), "shard_rows": SHARD_ROWS, "workers": 2,
        "timeout": 1200, "allow_hosts": [pictures.host],
        "ray": {"kind": "job", "address": place.dashboard},
    }  # fmt: skip
    deployment = get(place.api, "/deployments/name/ingest/cc12m")["id"]
    created = {"parameters": {"params": params}}
    return post(place.api, f"/deployments/{deployment}/create_flow_run", created)["id"]


def state(place: Place, run: str) -> str:
    return get(place.api, f"/flow_runs/{run}")["state"]["type"]


def ended(place: Place, run: str) -> str:
    """How the run ended, "" while it has not."""
    now = state(place, run)
    return now if now in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"} else ""


def log_of(place: Place, run: str) -> str:
    """Everything that the run has logged."""
    wanted = {"logs": {"flow_run_id": {"any_": [run]}}}
    return "\n".join(line["message"] for line in post(place.api, "/logs/filter", wanted))


def both_nodes_work(pictures: Pictures) -> bool:
    """Both shards are under way at once, and a node has room for one of their workers."""
    return {number // SHARD_ROWS for number in pictures.asked} == {0, 1}


def is_whole(root: Path) -> bool:
    """Every row of the list is stored, once."""
    store = Store(str(root / "data"))
    (stage,) = (s for s in Ledger(store).stage_ids() if s.startswith("fetch@"))
    commits = Ledger(store).commits(stage)
    return sum(c.samples for c in commits.values()) == ROWS and verify(store, deep=True).ok


def test_a_run_of_a_deployment_does_its_work_as_a_job_on_two_nodes(place, pictures, tmp_path):
    run = start(place, tmp_path, pictures)
    with worker(place):
        until(lambda: both_nodes_work(pictures) or ended(place, run), 600, "the download")
        assert both_nodes_work(pictures), log_of(place, run)
        pictures.gate.set()
        assert until(lambda: ended(place, run), 600, "the end of the run") == "COMPLETED"
    assert is_whole(tmp_path)
    assert "submitted job fourm-fetch-rows-" in log_of(place, run)
    assert "shards done 2" in log_of(place, run), "the job's own log"
    wanted = {"flow_runs": {"id": {"any_": [run]}}}
    shown = {artifact["key"] for artifact in post(place.api, "/artifacts/filter", wanted)}
    assert {"fetch-stages", "fetch-status", "fetch-fates"} <= shown


def test_a_run_whose_worker_and_flow_die_is_crashed_and_started_again_finds_its_job(
    place, pictures, tmp_path
):
    with _client(place) as client:
        set_up(client, apply=True, silence=90)
    run = start(place, tmp_path, pictures)
    with worker(place) as first:
        until(lambda: both_nodes_work(pictures) or ended(place, run), 600, "the download")
        until(lambda: _heartbeats(place, run), 120, "a heartbeat")
        end([first, *descendants(first)])
    assert until(lambda: ended(place, run), 600, "the crash of the silent run") == "CRASHED"
    jobs = JobsApi(Job(address=place.dashboard))
    (job,) = jobs.running()
    assert jobs.running() == {job: run}, "the job goes on by itself"
    again = {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": True}
    post(place.api, f"/flow_runs/{run}/set_state", again)
    with worker(place):
        until(lambda: f"job {job} is running already" in log_of(place, run), 600, "the job found")
        pictures.gate.set()
        assert until(lambda: ended(place, run), 600, "the end of the run") == "COMPLETED"
    assert is_whole(tmp_path)
    assert len(pictures.asked) == ROWS


@contextmanager
def _client(place: Place) -> Iterator[Any]:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: place.api}), get_client(sync_client=True) as client:
        yield client


def _heartbeats(place: Place, run: str) -> list[Any]:
    wanted = {"filter": {
        "event": {"name": ["prefect.flow-run.heartbeat"]},
        "resource": {"id": [f"prefect.flow-run.{run}"]},
    }}  # fmt: skip
    return post(place.api, "/events/filter", wanted)["events"]
