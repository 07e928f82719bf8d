"""A local Prefect server for as long as a command needs one.

Without a server every Prefect process, Ray's workers included, would start its own. Where
PREFECT_API_URL is set, that server is used instead. This module does not import Prefect: Prefect
reads its settings once, at import, and so has to be imported after :func:`prefect_server`.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from infra.backends import check_folder
from pipelines.attached import attached

logger = logging.getLogger("fourm.server")

START_SECONDS = 180.0
"""Most seconds to wait for the server: 10 on an idle machine, far more on a busy one."""

_SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "fourm",
    # What a server answers while its database is away: asked again for a minute.
    "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "DO_NOT_TRACK": "1",
}


@contextmanager
def prefect_server(home: Path) -> Iterator[str]:
    """Provide a Prefect API to this process and to those it starts.

    Args:
        home: Folder of the server's database and log. Runs of earlier commands stay visible.

    Yields:
        The address of the user interface.

    Raises:
        RuntimeError: The server did not come up, the message names its log; or none answers at
            the address that is set; or nothing can be written to the folder.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if url := os.environ.get("PREFECT_API_URL"):
        check_reachable(url)
        yield url.removesuffix("/api")
        return
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    home = home.absolute()
    try:
        check_folder(home)
    except ValueError as error:
        raise RuntimeError(
            f"{error}; a Prefect server of the command's own keeps its runs there. Set "
            "PREFECT_API_URL to one that keeps them elsewhere"
        ) from None
    env = {**os.environ, "PREFECT_HOME": str(home), "PREFECT_UI_API_URL": f"{url}/api"}
    command = [sys.executable, "-m", "prefect", "server", "start"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    log = home / "server.log"
    with attached(command, env=env, log=log) as process:
        _await_server(process, url, log)
        with _environment({"PREFECT_API_URL": f"{url}/api", "PREFECT_HOME": str(home)}):
            try:
                yield url
            finally:
                _drain()


def check_reachable(url: str) -> None:
    """Raises RuntimeError unless something answers at the address of a Prefect API."""
    try:
        urllib.request.urlopen(f"{url}/health", timeout=30).close()
    except urllib.error.HTTPError:
        return  # it wants a key, say: that is Prefect's to deal with, and so are certificates
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if not isinstance(reason, ssl.SSLError):
            raise RuntimeError(
                f"no Prefect server answers at PREFECT_API_URL={url} ({reason}): start it, or "
                "unset the variable for a server of the command's own"
            ) from None


def _drain() -> None:
    """Send what Prefect's background threads still hold: the server is about to go."""
    if "prefect" not in sys.modules:
        return
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (EventsWorker, APILogWorker):
        worker.drain_all(timeout=5)


def _await_server(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        # Not listening yet: refused, reset or slow.
        with suppress(OSError), urllib.request.urlopen(f"{url}/api/health", timeout=5) as answer:
            if json.load(answer) is True:
                return
        time.sleep(0.2)
    raise RuntimeError(f"the Prefect server did not start; its log is {log}")


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
