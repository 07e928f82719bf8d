"""SIGTERM during a training: finish the step, keep a checkpoint, then let the signal do its work.

Prefect acknowledges a cancelled run only while SIGTERM's handler is its own, and Ray puts its own
in place. So the handler here only takes note; whoever had the signal before gets it back, and the
signal with it, once the checkpoint is written.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Stopped(RuntimeError):
    """A training was asked to end early. Its checkpoint is written; the same call goes on."""


class StopSignal:
    """Takes note of SIGTERM inside a `with`, in the main thread; elsewhere it changes nothing.

    A process that ignores SIGTERM goes on ignoring it.
    """

    requested = False

    def __enter__(self) -> StopSignal:
        self._previous: Any = None
        if threading.current_thread() is threading.main_thread():
            previous = signal.getsignal(signal.SIGTERM)
            if previous not in (None, signal.SIG_IGN):
                self._previous = previous
                signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def hand_on(self) -> None:
        """After the `with`: gives a noted signal to the handler that was there before, if it was
        more than the system's default."""
        if self.requested and callable(self._previous):
            signal.raise_signal(signal.SIGTERM)
