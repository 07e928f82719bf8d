"""A Prefect server of its own for a test, and the waiting for what it does."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

ROOT = Path(__file__).parents[2]


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Address of its API, and the environment of its clients."""
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
    with process(command, environment):
        until(lambda: _healthy(api), 600, "the Prefect server")
        yield api, environment


@contextmanager
def process(command: list[Any], environment: dict[str, str]) -> Iterator[psutil.Popen]:
    """A program for the length of the block; it and all that it started are killed after it."""
    started = psutil.Popen(
        [str(part) for part in command], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        yield started
    finally:
        family = [*started.children(recursive=True), started]
        for member in family:
            if member.is_running():
                member.kill()
        psutil.wait_procs(family, timeout=10)


def _healthy(api: str) -> bool:
    try:
        return httpx.get(f"{api}/health", timeout=2).is_success
    except httpx.HTTPError:
        return False


def post(api: str, path: str, body: Any) -> Any:
    """The answer of Prefect's API, parsed."""
    answer = httpx.post(f"{api}{path}", json=body, timeout=30)
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
