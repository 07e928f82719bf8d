"""Helper processes end with their parent, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from pipelines.attached import attached

ROOT = Path(__file__).resolve().parents[2]
SLEEP = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); " \
    "time.sleep(600)"


def _wait_for(path: Path) -> int:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if path.exists() and (text := path.read_text()):
            return int(text)
        time.sleep(0.02)
    raise AssertionError("the child did not start")


def _is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:  # a process may vanish between any two questions about it
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_leaving_the_block_ends_the_child(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLEEP, str(tmp_path / "pid")]
    with attached(command, env=os.environ, log=tmp_path / "log"):
        pid = _wait_for(tmp_path / "pid")
        assert psutil.pid_exists(pid)
    assert _is_gone(pid)


def test_killing_the_parent_ends_the_child(tmp_path: Path) -> None:
    program = (
        "import os, sys, time; from pathlib import Path; from pipelines.attached import attached\n"
        f"folder = Path({str(tmp_path)!r})\n"
        f"command = [sys.executable, '-c', {SLEEP!r}, str(folder / 'pid')]\n"
        "with attached(command, env=os.environ, log=folder / 'log'): time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    pid = _wait_for(tmp_path / "pid")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert _is_gone(pid)
