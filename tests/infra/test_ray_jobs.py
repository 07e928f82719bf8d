"""Jobs are submitted once, found again, and followed to their end through a bad network."""

import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from infra import ray_jobs
from infra.ray_jobs import JobFailed, JobInfo, JobRequest, JobsApi, LastLines, attach, follow
from infra.ray_session import Job
from tests.infra.jobs_fake import FakeJobs


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(ray_jobs, "POLL_SECONDS", 0.01)


def request(job_id: str, owner: str = "run-1") -> JobRequest:
    return JobRequest(job_id, "python -c 0", owner)


def attached(jobs: FakeJobs, owner: str = "run-1") -> str:
    return attach(jobs, "fourm-label-1", lambda job_id: request(job_id, owner), owner=owner)


def test_a_restarted_flow_finds_its_job_instead_of_a_second_one():
    jobs = FakeJobs()
    assert attached(jobs) == attached(jobs) == attached(jobs, owner="run-2") == "fourm-label-1-0"
    assert len(jobs.submitted) == 1


@pytest.mark.parametrize("state", ["failed", "stopped"])
def test_a_job_that_ended_badly_is_followed_by_another(state):
    jobs = FakeJobs()
    jobs.states["fourm-label-1-0"] = JobInfo(state, owner="run-1")
    assert attached(jobs) == "fourm-label-1-1"


def test_a_done_job_counts_for_its_owner_alone():
    jobs = FakeJobs()
    jobs.states["fourm-label-1-0"] = JobInfo("succeeded", owner="run-1")
    assert attached(jobs) == "fourm-label-1-0"
    assert attached(jobs, owner="run-2") == "fourm-label-1-1"


def test_every_line_arrives_once_although_the_connection_breaks():
    jobs, lines, polls = FakeJobs(), [], []
    jobs.states["a"] = JobInfo("running")
    jobs.logs["a"] = ["one\ntw", "o\n", ConnectionError("reset"), "three\nfour"]

    def on_poll() -> None:
        polls.append(1)
        if len(polls) == 20:
            jobs.states["a"] = JobInfo("succeeded")

    assert follow(jobs, "a", on_line=lines.append, on_poll=on_poll).state == "succeeded"
    assert lines == ["one", "two", "three", "four"]


def test_a_dashboard_that_is_away_for_a_while_is_borne(monkeypatch):
    jobs = FakeJobs()
    jobs.states["a"], jobs.trouble = JobInfo("succeeded"), 5
    assert follow(jobs, "a", on_line=print).state == "succeeded"
    monkeypatch.setattr(ray_jobs, "PATIENCE_SECONDS", -1)
    jobs.trouble = 5
    with pytest.raises(JobFailed, match=r"out of reach.*the dashboard restarts"):
        follow(jobs, "a", on_line=print)


def test_a_job_that_vanishes_is_an_error():
    with pytest.raises(JobFailed, match="job a is gone"):
        follow(FakeJobs(), "a", on_line=print)


def test_a_failure_holds_the_end_of_the_log():
    last = LastLines()
    for number in range(100):
        last.add(f"line {number}")
    text = str(last.failure("a", JobInfo("failed", "exit code 1")))
    assert text.startswith("job a failed: exit code 1\nline 80\n")
    assert text.endswith("line 99")


class Client:
    """The part of Ray's client that is used, with its answers."""

    def __init__(self) -> None:
        self.jobs: dict[str, SimpleNamespace] = {}
        self.stops: list[str] = []

    def submit_job(self, **keywords: object) -> None:
        job_id = str(keywords["submission_id"])
        if job_id in self.jobs:
            raise RuntimeError("Request failed with status code 500: already exists")
        self.jobs[job_id] = SimpleNamespace(
            status="RUNNING", message=None, metadata=keywords["metadata"],
            submission_id=job_id, given=keywords,
        )  # fmt: skip

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        if job_id not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {job_id} does not exist")
        return self.jobs[job_id]

    def stop_job(self, job_id: str) -> None:
        self.stops.append(job_id)

    def list_jobs(self) -> list[SimpleNamespace]:
        return [*self.jobs.values(), SimpleNamespace(submission_id=None)]


def test_rays_answers_are_understood():
    api = JobsApi(Job(address="http://127.0.0.1:1", env={"A": "1"}, entrypoint_gpus=1))
    api.__dict__["_client"] = client = Client()
    assert api.find("fourm-a") is None
    api.submit(JobRequest("fourm-a", "python -c 0", "run-1", {"B": "2"}))
    api.submit(request("fourm-a"))
    given = client.jobs["fourm-a"].given
    assert given["runtime_env"] == {"env_vars": {"A": "1", "B": "2"}}
    assert given["entrypoint_num_gpus"] == 1
    assert api.find("fourm-a") == JobInfo("running", "", "run-1")
    client.submit_job(submission_id="theirs", metadata={"owner": "somebody"})
    assert api.running() == {"fourm-a": "run-1"}, "a cluster is shared with others"
    api.stop("fourm-a")
    client.jobs["fourm-a"].status = "STOPPED"
    api.stop("fourm-a")
    assert client.stops == ["fourm-a"], "what has ended is not stopped again"
    assert api.running() == {}


@pytest.mark.parametrize("name", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_the_cluster_that_is_named_is_asked_whatever_the_environment_names(monkeypatch, name):
    from ray.job_submission import JobSubmissionClient

    asked = []
    monkeypatch.setattr(
        JobSubmissionClient, "_check_connection_and_version",
        lambda client, *_, **__: asked.append(client._address),
    )  # fmt: skip
    monkeypatch.setenv(name, "http://127.0.0.1:2")
    client = JobsApi(Job(address="http://127.0.0.1:1"))._client
    assert {*asked, client._address} == {"http://127.0.0.1:1"}
    assert os.environ[name] == "http://127.0.0.1:2"


def test_an_error_other_than_a_taken_id_is_raised():
    api = JobsApi(Job())
    api.__dict__["_client"] = client = Client()
    client.submit_job = lambda **_: _refuse()
    with pytest.raises(RuntimeError, match="no room"):
        api.submit(request("a"))


def _refuse() -> None:
    raise RuntimeError("Request failed with status code 500: no room")


class Odd(BaseHTTPRequestHandler):
    """A dashboard of which all but the version is what a test wants."""

    version: bytes | None = b'{"ray_version": "2.40.0"}'
    status, body, header, endless = 200, b"", ("X-Odd", "1"), False

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        known = self.path == "/api/version" and self.version is not None
        self.send_response(200 if known else self.status)
        self.send_header(*self.header)
        self.end_headers()
        self.wfile.write(self.version if known else self.body)
        while self.endless and not known:
            try:
                self.wfile.write(b" ")
                time.sleep(0.01)
            except OSError:
                return


@pytest.fixture
def odd() -> Iterator[tuple[type[Odd], JobsApi]]:
    handler = type("Handler", (Odd,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield handler, JobsApi(Job(address=f"http://127.0.0.1:{server.server_port}"))
    server.shutdown()
    thread.join()
    server.server_close()


PAGE = b"<html>" + b"x" * 5000


@pytest.mark.parametrize(("answer", "words"), [
    ({"body": PAGE}, "answers otherwise than Ray"),
    ({"body": b""}, "answers otherwise than Ray"),
    ({"body": b"[1]"}, "answers otherwise than Ray"),
    ({"body": b"{}"}, "answers otherwise than Ray"),
    ({"body": b"[" * 100_000}, "RecursionError"),
    ({"version": b"{}"}, "answers otherwise than Ray"),
    ({"version": None, "body": PAGE}, "answers otherwise than Ray"),
    ({"status": 401, "body": PAGE}, "Authentication"),
    ({"status": 403, "body": PAGE}, "Authentication"),
    ({"status": 404, "body": PAGE}, "status code 404"),
    ({"status": 429}, "status code 429"),
    ({"status": 503, "body": PAGE}, "status code 503"),
    ({"status": 302, "header": ("Location", "/again")}, "TooManyRedirects"),
    ({"endless": True}, "has not ended after|timed out"),
])
def test_odd_answers_of_a_dashboard_are_passing_trouble_in_words(monkeypatch, odd, answer, words):
    handler, api = odd
    if "endless" in answer:
        monkeypatch.setattr(ray_jobs, "ANSWER_SECONDS", 1.0)
    for name, value in answer.items():
        setattr(handler, name, value)
    with pytest.raises((OSError, RuntimeError), match=words) as raised:
        api.find("fourm-a")
    assert "Ray's dashboard at http://127.0.0.1" in str(raised.value)
    assert len(str(raised.value)) < 500


def test_a_job_is_gone_only_where_ray_says_so(odd):
    handler, api = odd
    handler.status, handler.body = 404, b"Job fourm-a does not exist"
    assert api.find("fourm-a") is None
    handler.body = b"404 page not found"
    with pytest.raises(RuntimeError, match="404 page not found"):
        api.find("fourm-a")
