"""What a training run leaves in the store: checkpoints and the loss curve.

    <run>/checkpoints/step-00000100/{model,optimizer}.safetensors, then state.json
    <run>/curve.jsonl, <run>/tensorboard/

`state.json` is written last and names the digests of the tensors, so a checkpoint exists whole or
not at all, on disk and on S3 alike; what a killed run left half-written is never read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from infra.store import Store

logger = logging.getLogger("fourm.train")

KEEP = 2
FLUSH_SECONDS = 10.0
"""Most seconds that a point of the curve stays unseen by others."""
_STATE = re.compile(r"step-(\d+)/state\.json$")


class Checkpoints:
    """The checkpoints of the run at `path`; the newest complete one counts."""

    def __init__(self, store: Store, path: str) -> None:
        self._store, self._path = store, f"{path}/checkpoints"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        found = (_STATE.search(name) for name in self._store.list(self._path))
        return sorted(int(match.group(1)) for match in found if match)

    def save(self, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict) -> None:
        """Writes one file per entry of `tensors`, then `state`, then drops all but the newest."""
        from safetensors.torch import save

        folder = f"{self._path}/step-{step:08d}"
        digests = {}
        for name, group in tensors.items():
            data = save({key: value.detach().cpu().contiguous() for key, value in group.items()})
            self._store.write(f"{folder}/{name}.safetensors", data)
            digests[name] = hashlib.sha256(data).hexdigest()
        self._store.write_json(f"{folder}/state.json", {**state, "step": step, "sha256": digests})
        for old in self.steps()[:-KEEP]:
            self._delete(old)

    def newest(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict] | None:
        """The newest checkpoint whose tensors match their digests as (tensors, state), or None."""
        from safetensors.torch import load

        for step in reversed(self.steps()):
            folder = f"{self._path}/step-{step:08d}"
            state = self._store.read_json(f"{folder}/state.json")
            tensors = {}
            for name, digest in state["sha256"].items():
                data = self._store.read(f"{folder}/{name}.safetensors")
                if hashlib.sha256(data).hexdigest() != digest:
                    logger.warning("%s: %s is damaged, trying an older one", folder, name)
                    break
                tensors[name] = load(data)
            else:
                return tensors, state
        return None

    def clear(self) -> None:
        """Deletes all checkpoints, once the finished model is stored elsewhere."""
        for step in self.steps():
            self._delete(step)

    def _delete(self, step: int) -> None:
        folder = f"{self._path}/step-{step:08d}"
        # state.json first: without it the rest is no checkpoint, whenever this is interrupted.
        names = self._store.list(folder)
        for name in sorted(names, key=lambda name: not name.endswith("state.json")):
            self._store.delete(name)


class Curve:
    """The loss curve of a run: lines of JSON, and TensorBoard events beside them.

    Object stores cannot append, so lines gather here and `flush` rewrites the object.
    """

    def __init__(self, store: Store, path: str, step: int) -> None:
        """Keeps the lines an earlier part of the run wrote before `step`."""
        self._store, self._path = store, path
        self._lines: list[dict[str, Any]] = []
        self._events = tempfile.TemporaryDirectory(prefix="fourm-events-")
        if step:
            self._lines = [line for line in read_curve(store, path) if line["step"] <= step]
        self._writer: Any = None
        self._flushed = time.monotonic()

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Records metrics reached after `step` optimizer steps."""
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:
            self._writer = SummaryWriter(self._events.name)
        self._lines.append({"step": step, **metrics})
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
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
        self._events.cleanup()


def read_curve(store: Store, path: str) -> list[dict[str, Any]]:
    """Lines of the loss curve of the run at `path`; empty if there is none yet."""
    name = f"{path}/curve.jsonl"
    if not store.exists(name):
        return []
    return [json.loads(line) for line in store.read(name).decode().splitlines()]
