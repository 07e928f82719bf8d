"""A headless Chromium for tests, driven by its DevTools protocol: pages, expressions, pictures.

On Debian and Ubuntu: apt-get install chromium
"""

from __future__ import annotations

import base64
import json
import shutil
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from tests.infra.serving import process, until

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--no-proxy-server", "--remote-debugging-port=0",
    "--window-size=1400,1000",
    # Nothing but this machine can be reached.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


class Page:
    """One tab."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._numbers = socket, count(1)
        self.send("Page.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command of the DevTools protocol."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(timeout=120))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, url: str) -> None:
        """Go to an address."""
        self.send("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is on the page; None where it fails."""
        return self.send("Runtime.evaluate", expression=expression, returnByValue=True)[
            "result"
        ].get("value")

    def wait_for(self, expression: str, what: str, seconds: float = 120) -> Any:
        """The first true value of an expression."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := self.value(expression):
                return value
            time.sleep(0.3)
        text = self.value("document.body && document.body.innerText")
        pytest.fail(f"{what} did not come within {seconds:g} s; the page reads: {text}")

    def screenshot(self, path: Path) -> None:
        """A PNG of what is seen."""
        data = self.send("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def page() -> Iterator[Page]:
    """A tab of a browser of its own; the test is skipped where there is no Chromium."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed: apt-get install chromium")
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        ready = Path(profile) / "DevToolsActivePort"
        with process(command, None):
            until(lambda: ready.exists() and ready.read_text().count("\n"), 120, "the browser")
            port = ready.read_text().split("\n")[0]
            found = until(lambda: _tabs(port), 60, "a tab")
            with connect(found[0], max_size=None, proxy=None) as socket:
                yield Page(socket)


def _tabs(port: str) -> list[str]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/json", timeout=30) as answer:
        return [t["webSocketDebuggerUrl"] for t in json.load(answer) if t["type"] == "page"]
