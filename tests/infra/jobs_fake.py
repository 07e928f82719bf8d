"""A place for jobs that lives in memory, for the tests of those who follow them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from infra.ray_jobs import JobInfo, JobRequest


class FakeJobs:
    """Jobs whose state and log a test sets; `on_submit` may already end them."""

    def __init__(self, on_submit: Callable[[JobRequest], None] | None = None) -> None:
        self.submitted: list[JobRequest] = []
        self.states: dict[str, JobInfo] = {}
        self.logs: dict[str, list[str | Exception]] = {}
        self.stopped: list[str] = []
        self.on_submit = on_submit
        self.trouble = 0
        """So many questions are answered by an error."""

    def submit(self, request: JobRequest) -> None:
        self.submitted.append(request)
        self.states[request.job_id] = JobInfo("running", owner=request.owner)
        if self.on_submit:
            self.on_submit(request)

    def find(self, job_id: str) -> JobInfo | None:
        if self.trouble:
            self.trouble -= 1
            raise ConnectionError("the dashboard restarts")
        return self.states.get(job_id)

    async def tail(self, job_id: str) -> AsyncIterator[str]:
        """Each connection reads the log from its beginning, up to the first error in it."""
        log = self.logs.get(job_id, [])
        for at, piece in enumerate(log):
            if isinstance(piece, Exception):
                log.pop(at)
                raise piece
            yield piece

    def stop(self, job_id: str) -> None:
        self.stopped.append(job_id)
        self.states[job_id] = JobInfo("stopped")
