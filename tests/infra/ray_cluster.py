"""A Ray cluster of several nodes on the loopback of this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from infra.ray_jobs import JobsApi
from infra.ray_session import Job
from tests.infra.serving import ROOT, free_port, process, until

ENVIRONMENT = {
    **os.environ,
    "RAY_AUTH_MODE": "disabled",
    # What workers import, and the `python` of a job's command.
    "PYTHONPATH": str(ROOT),
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# Ray takes the machine's own address for 127.0.0.1, which anybody can reach; not so for its like.
_HEAD, _NODE = "127.0.0.2", "127.0.0.3"
_SIGN = "Ray runtime started."
_START = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
_START += ["--disable-usage-stats", f"--object-store-memory={128 * 1024**2}"]


@contextmanager
def head(cpus: int = 2) -> Iterator[tuple[str, str]]:
    """A head node: the address for drivers and other nodes, and that of its dashboard."""
    port, dashboard = free_port(), free_port()
    command = [*_START, "--head", f"--node-ip-address={_HEAD}", f"--port={port}"]
    command += [f"--num-cpus={cpus}", "--include-dashboard=true", "--dashboard-host=127.0.0.1"]
    command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"]
    url = f"http://127.0.0.1:{dashboard}"
    # The folder of a test would be too long a name for Ray's sockets.
    with TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        with _started([*command, f"--temp-dir={folder}"]):
            until(lambda: _reachable(url), 600, "the dashboard")
            yield f"{_HEAD}:{port}", url


@contextmanager
def node(address: str, cpus: int = 1) -> Iterator[psutil.Popen]:
    """One more node of a cluster; killing the yielded process's family removes it."""
    command = [*_START, f"--address={address}", f"--node-ip-address={_NODE}"]
    command += [f"--num-cpus={cpus}", f"--dashboard-agent-listen-port={free_port()}"]
    with _started(command) as started:
        yield started


@contextmanager
def _started(command: list[str]) -> Iterator[psutil.Popen]:
    """A node that is up. Ray gives its helpers 15 s; on a busy machine that takes some attempts."""
    with TemporaryDirectory() as folder, ExitStack() as stack:
        for attempt in range(5):
            said = Path(folder) / f"{attempt}.log"
            started = stack.enter_context(process(command, ENVIRONMENT, said))
            if until(partial(_outcome, started, said), 600, "a node") == "up":
                break
        else:
            pytest.fail(f"Ray did not start: {said.read_text()}")
        yield started


def _outcome(started: psutil.Popen, said: Path) -> str:
    if started.poll() is not None:
        return "ended"
    return "up" if _SIGN in said.read_text() else ""


def _reachable(url: str) -> bool:
    try:
        return JobsApi(Job(address=url)).find("nothing") is None
    except (OSError, RuntimeError):
        return False
