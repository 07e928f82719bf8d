"""A Prefect server of its own for a test, and the waiting for what it does."""

import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

ROOT = Path(__file__).parents[2]


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Address of its API, and the environment of its clients."""
    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    environment = os.environ | {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": api,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    with process(command, environment):
        until(lambda: _healthy(api), 600, "the Prefect server")
        yield api, environment


@contextmanager
def process(
    command: list[Any], environment: dict[str, str] | None, output: Path = Path(os.devnull)
) -> Iterator[psutil.Popen]:
    """A program for the length of the block; it and all that it started are killed after it."""
    words = [str(part) for part in command]
    with output.open("wb") as stdout:
        started = psutil.Popen(words, env=environment, stdout=stdout)
    try:
        yield started
    finally:
        end([*descendants(started), started])


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """All that a process has started and that lives; none where the process is gone."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def end(processes: Iterable[psutil.Process]) -> None:
    """Kill processes, which may be gone already, and wait until they are."""
    processes = list(processes)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def command_of(process: psutil.Process) -> str:
    """The command line of a process, empty where it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def alive(process: psutil.Process) -> bool:
    """Whether a process still does something; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    """A port that nobody listens on, below those that the system hands out by itself."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def _healthy(api: str) -> bool:
    try:
        return httpx.get(f"{api}/health", timeout=2).is_success
    except httpx.HTTPError:
        return False


def post(api: str, path: str, body: Any) -> Any:
    """The answer of Prefect's API, parsed."""
    return _ask("POST", f"{api}{path}", json=body)


def get(api: str, path: str) -> Any:
    """The answer of Prefect's API, parsed."""
    return _ask("GET", f"{api}{path}")


def _ask(method: str, url: str, **content: Any) -> Any:
    def answered() -> httpx.Response | None:
        # 503 is a database that another request has locked; nothing has been done then.
        found = httpx.request(method, url, timeout=120, **content)
        return None if found.status_code == httpx.codes.SERVICE_UNAVAILABLE else found

    answer = until(lambda: (found := answered()) is not None and [found], 120, url)[0]
    answer.raise_for_status()
    return answer.json() if answer.content else None


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of a condition that is asked until then."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.5)
    pytest.fail(f"{what} did not come within {seconds:g} s")
