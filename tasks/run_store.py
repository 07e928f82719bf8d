"""What a training run leaves in the store: checkpoints and the loss curve.

    <run>/checkpoints/step-00000100/{model,optimizer}.safetensors, then state.json
    <run>/checkpoints/owner.json   who trains it: the last that began
    <run>/curve.jsonl, <run>/tensorboard/

`state.json` is written last and names the digests of the tensors, so a checkpoint exists whole or
not at all, on disk and on S3 alike; what a killed run left half-written is never read.

Workers that hold parts of the tensors write a file each, `model.00001-of-00004.safetensors`, and
its digests as `rank-00001.json`; the first one waits for these and then writes `state.json`. A
tensor is the concatenation of its parts, so any number of workers can read what another wrote.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from infra.store import Store

logger = logging.getLogger("fourm.train")

Tensors = dict[str, dict[str, "torch.Tensor"]]
Owner = dict[str, str | int]
"""Host, process, token and beginning of a training."""
KEEP = 2
FLUSH_SECONDS = 10.0
"""Most seconds that a point of the curve stays unseen by others."""
OTHERS_SECONDS = 600.0
"""Most seconds that the first worker waits for the others' parts of a checkpoint."""
_STATE = re.compile(r"step-(\d+)/state\.json$")
_STEP = re.compile(r"(step-\d+)/")
_OWNER = "owner.json"


class TakenOver(RuntimeError):
    """Somebody else has begun to train the same run: two would undo each other's checkpoints."""


class Checkpoints:
    """The checkpoints of the run at `path`; the newest complete one counts.

    One training at a time writes them: who calls `claim` ends another at its next `save`. So a
    run goes on at once after its process was killed, and needs nobody's leave.

    Args:
        store: Where they lie.
        path: Of the run.
        owner: What `claim` gave another process of the same training.
    """

    def __init__(self, store: Store, path: str, owner: Owner | None = None) -> None:
        self._store, self._path, self.owner = store, f"{path}/checkpoints", owner

    def claim(self) -> Owner:
        """From now on this training writes the checkpoints of the run, and no other does."""
        self.owner = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex,
                      "since": datetime.now(UTC).isoformat(timespec="seconds")}  # fmt: skip
        self._store.write_json(f"{self._path}/{_OWNER}", self.owner)
        return self.owner

    def check_owner(self) -> None:
        """Raises `TakenOver` where another training has claimed the run since this one did."""
        if self.owner is None or not self._store.exists(name := f"{self._path}/{_OWNER}"):
            return
        found = self._store.read_json(name)
        if found != self.owner:
            raise TakenOver(
                f"{self._store.full(self._path)}: process {found['pid']} on {found['host']} trains "
                f"this run since {found['since']}, from its newest checkpoint on; this one ends. "
                "Give another name to a run that is meant to be another"
            )

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        found = (_STATE.search(name) for name in self._store.list(self._path))
        return sorted(int(match.group(1)) for match in found if match)

    def save(
        self, step: int, tensors: Tensors, state: dict[str, Any], *, rank: int = 0, world: int = 1
    ) -> None:
        """Writes one file per entry of `tensors`, then `state`, then drops all but the newest.

        With a `world` above 1 every worker calls it with its parts.

        Raises:
            TakenOver: another process has claimed the run since this one did.
            TimeoutError: another worker's part has not come.
        """
        from safetensors.torch import save

        self.check_owner()
        folder = f"{self._path}/step-{step:08d}"
        part = f".{rank:05d}-of-{world:05d}" if world > 1 else ""
        digests = {}
        for name, group in tensors.items():
            data = save({key: value.detach().cpu().contiguous() for key, value in group.items()})
            self._store.write(f"{folder}/{name}{part}.safetensors", data)
            digests[f"{name}{part}"] = hashlib.sha256(data).hexdigest()
        if rank:
            self._store.write_json(f"{folder}/rank-{rank:05d}.json", digests)
            return
        for other in range(1, world):
            digests |= self._others(f"{folder}/rank-{other:05d}.json")
        self._store.write_json(f"{folder}/state.json", {**state, "step": step, "sha256": digests})
        for old in self.steps()[:-KEEP]:
            self._delete(f"step-{old:08d}")

    def _others(self, name: str) -> dict[str, str]:
        deadline = time.monotonic() + OTHERS_SECONDS
        while not self._store.exists(name):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._store.full(name)} has not come in {OTHERS_SECONDS} s; "
                                   "is a worker lost?")
            time.sleep(0.1)
        return self._store.read_json(name)

    def newest(self, at: int | None = None) -> tuple[Tensors, dict[str, Any]] | None:
        """The newest checkpoint whose tensors match their digests as (whole tensors, state); with
        `at` the one of that step.

        Raises:
            ValueError: the one of the step `at` is damaged.
        """
        for step in reversed(self.steps() if at is None else [at]):
            try:
                return self._load(f"{self._path}/step-{step:08d}")
            except (ValueError, FileNotFoundError) as error:
                if at is not None:
                    raise
                logger.warning("%s; trying an older checkpoint", error)
        return None

    def _load(self, folder: str) -> tuple[Tensors, dict[str, Any]]:
        import torch
        from safetensors.torch import load

        state = self._store.read_json(f"{folder}/state.json")
        parts: dict[str, dict[str, list[torch.Tensor]]] = {}
        for file, digest in sorted(state["sha256"].items()):
            name = f"{folder}/{file}.safetensors"
            data = self._store.read(name)
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError(f"{self._store.full(name)} is damaged")
            group = parts.setdefault(file.partition(".")[0], {})
            for key, value in load(data).items():
                group.setdefault(key, []).append(value)
        whole = {name: {key: torch.cat(values) if len(values) > 1 else values[0]
                        for key, values in group.items()} for name, group in parts.items()}
        return whole, state

    def begin(self, step: int) -> None:
        """Claims the run, unless that was done, and deletes what has no use for it from `step` on:
        what killed runs left half-written, and later checkpoints. Those are damaged, and would
        outlive each new one."""
        if self.owner is None:
            self.claim()
        names = self._store.list(self._path)
        found = {match.group(1) for name in names if (match := _STEP.search(name))}
        usable = {f"step-{done:08d}" for done in self.steps() if done <= step}
        for folder in sorted(found - usable):
            self._delete(folder)

    def clear(self) -> None:
        """Deletes all checkpoints, once the finished model is stored elsewhere."""
        for step in self.steps():
            self._delete(f"step-{step:08d}")
        self._store.delete(f"{self._path}/{_OWNER}")

    def _delete(self, folder: str) -> None:
        # state.json first: without it the rest is no checkpoint, whenever this is interrupted.
        names = self._store.list(f"{self._path}/{folder}")
        for name in sorted(names, key=lambda name: not name.endswith("state.json")):
            self._store.delete(name)


class Background:
    """Runs one call after another in a thread, at most one waiting: what a call raises, the next
    `submit` or `wait` raises."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def submit(self, call: Callable[[], None]) -> None:
        """Waits for the call before, then starts this one."""
        self.wait()
        self._running = self._pool.submit(call)

    def wait(self) -> None:
        """Returns when nothing runs."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Ends the thread after its call."""
        self._pool.shutdown(wait=True)


class Curve:
    """The loss curve of a run: lines of JSON, and TensorBoard events beside them.

    Object stores cannot append, so lines gather here and `flush` rewrites the object. `mirror` is a
    run of Weights & Biases, or None.
    """

    def __init__(self, store: Store, path: str, step: int, mirror: Any = None) -> None:
        """Keeps the lines an earlier part of the run wrote before `step`."""
        self._store, self._path, self._mirror = store, path, mirror
        self._lines: list[dict[str, Any]] = []
        self._events, self._step = tempfile.TemporaryDirectory(prefix="fourm-events-"), step
        if step:
            self._lines = [line for line in read_curve(store, path) if line["step"] <= step]
        self._writer: Any = None
        self._flushed = time.monotonic()

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Records metrics reached after `step` optimizer steps."""
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:
            # Readers drop what the part before showed of steps that are done again.
            self._writer = SummaryWriter(self._events.name, purge_step=self._step + 1)
        self._lines.append({"step": step, **metrics})
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        if self._mirror is not None:
            self._mirror.log(metrics, step=step)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes curve and events to the store."""
        self._flushed = time.monotonic()
        text = "".join(json.dumps(line) + "\n" for line in self._lines)
        self._store.write(f"{self._path}/curve.jsonl", text.encode())
        if self._writer is not None:
            self._writer.flush()
            for file in Path(self._events.name).iterdir():
                self._store.write(f"{self._path}/tensorboard/{file.name}", file.read_bytes())

    def close(self) -> None:
        """Flushes and removes the local scratch folder."""
        self.flush()
        if self._writer is not None:
            self._writer.close()
        if self._mirror is not None:
            self._mirror.finish()
        self._events.cleanup()


def read_curve(store: Store, path: str) -> list[dict[str, Any]]:
    """Lines of the loss curve of the run at `path`; empty if there is none yet."""
    name = f"{path}/curve.jsonl"
    if not store.exists(name):
        return []
    return [json.loads(line) for line in store.read(name).decode().splitlines()]
