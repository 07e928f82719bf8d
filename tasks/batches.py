"""Batches on their way to the network: computed ahead in a thread, moved to a device."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def to_device(batch: Any, device: torch.device) -> Any:
    """Moves tensors and (nested) containers of them; other values pass through."""
    if hasattr(batch, "to"):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        moved = {f.name: to_device(getattr(batch, f.name), device)
                 for f in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **moved)
    return batch


def prefetch(make: Callable[[int], Any], start: int, stop: int) -> Generator[Any, None, None]:
    """Yields make(start), ..., make(stop - 1), computed two ahead by a background thread."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=2)
    closed = threading.Event()

    def put(item: Any) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def produce() -> None:
        for step in range(start, stop):
            if closed.is_set():
                return
            item: tuple[Any, Exception | None]
            try:
                item = (make(step), None)
            except Exception as error:  # noqa: BLE001 - raised again where the batch is needed
                item = (None, error)
            put(item)

    threading.Thread(target=produce, daemon=True, name="batches").start()
    try:
        for _ in range(start, stop):
            batch, error = ready.get()
            if error is not None:
                raise error
            yield batch
    finally:
        closed.set()
