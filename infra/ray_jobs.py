"""Jobs on a Ray cluster that outlive whoever asked for them.

    job_id = attach(jobs, stem, request_for, owner=flow_run_id)    # submit, or find it running
    ended = follow(jobs, job_id, on_line=..., on_poll=...)         # its log lines, until it ends

Submitting is idempotent. A job's id is made from what it is to do and a number, and `attach` takes
the first number that is free, still at work, or done for the same owner: a flow that was killed
and restarted finds its job, and only a failed or stopped job is followed by another. The cluster
is behind a network, so `follow` puts up with a dashboard that is away for a while.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal, Protocol

from infra.ray_session import Job

log = logging.getLogger("fourm.jobs")

POLL_SECONDS = 2.0
PATIENCE_SECONDS = 300.0
"""How long a cluster may be out of reach before following its job is given up."""
ANSWER_SECONDS = 30.0
"""How long an answer of the dashboard may take."""
LAST_WORDS_SECONDS = 10.0
"""How long the log of a job that has ended is waited for."""
TAIL_LINES = 20
"""Lines of a failed job's log that its error repeats."""

OURS = "fourm-"
"""How the ids of our jobs begin; a cluster may be shared with others."""

_ANSWER_BYTES = 64 << 20
_SAID = 300  # characters of an error that are told
_ENVIRONMENT = threading.Lock()

State = Literal["waiting", "running", "succeeded", "failed", "stopped"]
ALIVE = ("waiting", "running")


class JobFailed(RuntimeError):
    """A job ended otherwise than well; the message holds the end of its log."""


@dataclass(frozen=True)
class JobRequest:
    """What a job runs."""

    job_id: str
    entrypoint: str
    """Shell command; made of characters that need no quotes."""
    owner: str = ""
    """Who asked: a flow run's id."""
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class JobInfo:
    """How a job is."""

    state: State
    message: str = ""
    owner: str = ""


class Jobs(Protocol):
    """A place that runs jobs. Trouble to reach it raises OSError or RuntimeError."""

    def submit(self, request: JobRequest) -> None:
        """Start a job; nothing happens where one of that id exists."""
        ...

    def find(self, job_id: str) -> JobInfo | None:
        """How a job is; None where there is none."""
        ...

    def tail(self, job_id: str) -> AsyncIterator[str]:
        """Pieces of the job's log from its beginning, until the job ends."""
        ...

    def stop(self, job_id: str) -> None:
        """End a job and what it occupies; nothing happens where it has ended."""
        ...


def attach(
    jobs: Jobs, stem: str, request_for: Callable[[str], JobRequest], *, owner: str
) -> str:
    """The id of a job that does what is asked: one at work, one done for this owner, or a new one.

    Args:
        stem: names the work; equal work has equal stems.
        request_for: job id -> what to submit.
        owner: a job that succeeded for another owner is run again: there may be new work since.
    """
    for number in itertools.count():
        job_id = f"{stem}-{number}"
        info = jobs.find(job_id)
        if info is None:
            jobs.submit(request_for(job_id))
            log.info("submitted job %s", job_id)
            return job_id
        if info.state in ALIVE or (info.state == "succeeded" and owner and info.owner == owner):
            log.info("job %s is %s already", job_id, info.state)
            return job_id
    raise AssertionError("unreachable")


def follow(
    jobs: Jobs,
    job_id: str,
    *,
    on_line: Callable[[str], None],
    on_poll: Callable[[], None] = lambda: None,
) -> JobInfo:
    """Hand over the job's log line by line until it ends, however it ends.

    Args:
        on_poll: called every `POLL_SECONDS`, and once after the end.

    Raises:
        JobFailed: the job is gone, or its cluster is out of reach for `PATIENCE_SECONDS`.
    """
    tail = _Tail(jobs, job_id)
    reached = time.monotonic()
    while True:
        tail.drain(on_line)
        try:
            info = jobs.find(job_id)
            reached = time.monotonic()
        except (OSError, RuntimeError) as error:
            away = time.monotonic() - reached
            if away > PATIENCE_SECONDS:
                what = f"job {job_id} is out of reach for {away:.0f} s"
                raise JobFailed(f"{what}: {error}") from error
            log.warning("job %s cannot be asked: %s", job_id, error)
        else:
            if info is None:
                raise JobFailed(f"job {job_id} is gone: its cluster was removed or restarted")
            if info.state not in ALIVE:
                tail.finish(on_line)
                on_poll()
                return info
        on_poll()
        time.sleep(POLL_SECONDS)


class LastLines:
    """The end of a log, for the message of a failure."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)

    def add(self, line: str) -> None:
        """Take up a line."""
        self._lines.append(line)

    def failure(self, job_id: str, info: JobInfo) -> JobFailed:
        """The error of a job that ended badly."""
        end = "\n".join(self._lines)
        why = f": {info.message}" if info.message else ""
        return JobFailed(f"job {job_id} {info.state}{why}\n{end}".rstrip())


class _Tail:
    """Reads a log on a thread; after a broken connection it goes on where it was."""

    def __init__(self, jobs: Jobs, job_id: str) -> None:
        self._jobs, self._job_id = jobs, job_id
        self._pieces: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._seen, self._rest = 0, ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, name=f"log-{job_id}", daemon=True)
        self._thread.start()

    def drain(self, on_line: Callable[[str], None]) -> None:
        """Hand over the whole lines that have come in."""
        while not self._pieces.empty():
            *lines, self._rest = (self._rest + self._pieces.get()).split("\n")
            for line in lines:
                on_line(line)

    def finish(self, on_line: Callable[[str], None]) -> None:
        """Hand over what is left of the log of a job that has ended."""
        self._over.set()
        self._thread.join(timeout=LAST_WORDS_SECONDS)
        self.drain(on_line)
        if self._rest:
            on_line(self._rest)
            self._rest = ""

    def _read(self) -> None:
        while True:
            over = self._over.is_set()
            try:
                asyncio.run(self._read_once())
                # The log ends with the job; a connection that was closed early is opened again.
                if over or self._over.wait(2 * POLL_SECONDS):
                    return
            except Exception:
                log.debug("the log of %s broke off", self._job_id, exc_info=True)
                if over:  # the job has ended and so has its cluster
                    return
                self._over.wait(POLL_SECONDS)

    async def _read_once(self) -> None:
        skip = self._seen
        async for piece in self._jobs.tail(self._job_id):
            fresh, skip = piece[skip:], max(0, skip - len(piece))
            self._seen += len(fresh)
            if fresh:
                self._pieces.put(fresh)


class JobsApi:
    """Ray's Jobs API at the address of a dashboard.

    A cluster with token authentication needs RAY_AUTH_MODE=token and its token in the environment.
    """

    def __init__(self, target: Job) -> None:
        self._target = target

    @cached_property
    def _client(self) -> Any:
        with _of_no_cluster():
            return _client_class()(self._target.address)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Trouble of any kind as the two that a `Jobs` has, with the address and few words: Ray's
        client passes on what proxies write, and what it fails at in answers that are not Ray's."""
        try:
            yield
        except Exception as error:
            kind = RuntimeError if isinstance(error, RuntimeError) else ConnectionError
            what = " ".join(f"{type(error).__name__}: {error}".split())[:_SAID]
            if isinstance(error, ValueError | KeyError | TypeError | AttributeError):
                what = f"what is there answers otherwise than Ray ({what})"
            raise kind(f"Ray's dashboard at {self._target.address} cannot be asked: {what}") \
                from error  # fmt: skip

    def submit(self, request: JobRequest) -> None:
        try:
            with self._asked():
                self._client.submit_job(
                    entrypoint=request.entrypoint,
                    submission_id=request.job_id,
                    metadata={"owner": request.owner},
                    runtime_env={"env_vars": {**self._target.env, **request.env}},
                    entrypoint_num_cpus=self._target.entrypoint_cpus or None,
                    entrypoint_num_gpus=self._target.entrypoint_gpus or None,
                )
        except (OSError, RuntimeError):
            # An id that is taken is answered like any other error of the server, and a request
            # whose answer was lost may have been heard.
            if self.find(request.job_id) is None:
                raise

    def find(self, job_id: str) -> JobInfo | None:
        with self._asked():
            try:
                return _info(self._client.get_job_info(job_id))
            except RuntimeError as error:
                # A proxy that does not reach the cluster answers 404 too, in other words.
                if "status code 404" in str(error) and "does not exist" in str(error):
                    return None
                raise

    def tail(self, job_id: str) -> AsyncIterator[str]:
        return self._client.tail_job_logs(job_id)

    def stop(self, job_id: str) -> None:
        info = self.find(job_id)
        if info is not None and info.state in ALIVE:
            with self._asked():
                self._client.stop_job(job_id)

    def running(self) -> dict[str, str]:
        """Job id -> owner of every job of ours that has not ended."""
        found = {}
        with self._asked():
            listed = list(self._client.list_jobs())
        for details in listed:
            job_id: str = details.submission_id or ""
            if job_id.startswith(OURS):
                info = _info(details)
                if info.state in ALIVE and info.owner:
                    found[job_id] = info.owner
        return found


@cache
def _client_class() -> type[Any]:
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Waits neither for ever nor for an answer without end, as Ray's own does."""

        def _do_request(self, method: str, endpoint: str, **keywords: Any) -> Any:
            keywords |= {"timeout": ANSWER_SECONDS, "hooks": {"response": _read}}
            return super()._do_request(method, endpoint, **keywords)

    return Client


def _read(answer: Any, **_: Any) -> None:
    """Reads the body of an answer, in bounded time and memory."""
    end, body = time.monotonic() + ANSWER_SECONDS, bytearray()
    while piece := answer.raw.read1(1 << 16, decode_content=True):
        body += piece
        if len(body) > _ANSWER_BYTES or time.monotonic() > end:
            answer.close()
            raise ConnectionError(f"the answer has not ended after {len(body)} bytes")
    answer._content, answer._content_consumed = bytes(body), True


@contextmanager
def _of_no_cluster() -> Iterator[None]:
    """Hides the cluster that this process belongs to or is told of: Ray's client would ask it in
    place of the one that is named."""
    with _ENVIRONMENT:
        names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
        kept = {name: os.environ.pop(name) for name in names if name in os.environ}
        try:
            yield
        finally:
            os.environ.update(kept)


def _info(details: Any) -> JobInfo:
    """Ours for Ray's account of a job."""
    state: State = _STATES.get(str(getattr(details.status, "value", details.status)), "waiting")
    return JobInfo(state, details.message or "", (details.metadata or {}).get("owner", ""))


_STATES: dict[str, State] = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "STOPPED": "stopped",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
}
