"""A helper process that ends with the program that started it, even when that is killed.

The child runs under a small keeper (this module as a program) whose standard input is a pipe from
the parent. The system closes that pipe whenever the parent dies, SIGKILL included, and the keeper
then stops the child: no orphan holds a port or a database for the next run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

STOP_SECONDS = 10.0
"""Most seconds for the child to stop by itself before it is killed."""


@contextmanager
def attached(
    command: Sequence[str], *, env: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` for the length of the block, its output appended to `log`.

    Yields:
        The keeper's process; it ends as soon as the command does.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        keeper = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(env),
            # Ctrl-C in the terminal is for the parent, which stops this in its own time.
            start_new_session=True,
        )
    try:
        yield keeper
    finally:
        assert keeper.stdin is not None
        keeper.stdin.close()
        keeper.wait(timeout=3 * STOP_SECONDS)


def _keep(command: Sequence[str]) -> int:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_stop_at_end_of_input, args=(child,), daemon=True).start()
    return child.wait()


def _stop_at_end_of_input(child: subprocess.Popen[bytes]) -> None:
    # Raw reads: a buffered reader's lock would be held at interpreter exit.
    while os.read(0, 1024):
        continue
    child.terminate()
    try:
        child.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(_keep(sys.argv[1:]))
