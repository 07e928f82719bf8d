"""The released 4M code beside ours: asked, in a process of its own, to do the same once more.

Nothing of it is part of this project. `--peer` names a checkout of it, which the user has fetched:

    git clone https://github.com/apple/ml-4m
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MARKS = ("fourm/models/fm.py", "fourm/models/generate.py", "run_training_4m.py")
_DRIVER = Path(__file__).with_name("peer_driver.py")
_SHOWN = 2000


class PeerFailed(RuntimeError):
    """The released code did not do what was asked; the message ends with what it printed."""


def check_peer(path: Path) -> None:
    """Raises ValueError where `path` is no checkout of the released code."""
    missing = [mark for mark in _MARKS if not (path / mark).exists()]
    if missing:
        raise ValueError(f"{path} is no checkout of the released 4M code, it lacks {missing[0]}: "
                         "git clone https://github.com/apple/ml-4m")


class Peer:
    """A process that runs the released code. Raises ValueError where `folder` is no checkout."""

    def __init__(self, folder: str, threads: int) -> None:
        path = Path(folder)
        check_peer(path)
        self.peak = 0
        """Largest resident memory of the process so far, bytes."""
        self.found: dict[str, Any] = {}
        self.stand_ins: list[str] = []
        """Packages that the released code imports and that are not installed."""
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_DRIVER), str(path.resolve()), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def prepare(self, work: str, **settings: Any) -> Callable[..., float]:
        """Sets a work up and returns what does it once, with keywords if the work has any, and
        says how many seconds that took; what else it found is then in `found`."""
        name = f"{work} {json.dumps(settings, sort_keys=True)}"
        self._ask({"do": "prepare", "as": name, "work": work, "settings": settings})

        def run(**how: Any) -> float:
            self.found = self._ask({"do": "run", "as": name, "how": how})
            return float(self.found["seconds"])

        return run

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        answer = ""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            pass
        if not answer:
            self._process.wait()
            self._log.seek(0)
            raise PeerFailed(f"the released code ended:\n{self._log.read()[-_SHOWN:]}")
        found = json.loads(answer)
        self.peak, self.stand_ins = found["peak"], found["stand_ins"]
        return found
