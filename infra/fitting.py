"""Batches that fit into memory: halved, and run again, as often as it runs out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

log = logging.getLogger("fourm.runner")
R = TypeVar("R")
Items = Any
"""A sequence, or an array whose first axis counts items: whatever has a length and slices."""

_SIGNS = ("can't allocate memory", "ALLOC_FAILED", "CUDA error: out of memory",
          "Triton Error [CUDA]: out of memory")  # fmt: skip
"""What torch says on a CPU, and what cuBLAS, cuDNN, CUDA and Triton say, in errors of no kind of
their own."""


class FittingBatches:
    """Hands items to a network in batches of a size that fits.

    A batch that finds no memory is halved and run again. The smaller size stays for the life of
    this object, one worker's: what did not fit once would soon not fit again.

    Args:
        size: items of a batch to begin with, at least 1.
        what: whose batches they are, for messages.
    """

    def __init__(self, size: int, what: str) -> None:
        if size < 1:
            raise ValueError(f"batches of {size} for {what}; they hold at least 1")
        self.size, self._what = size, what

    def __call__(
        self, call: Callable[[Any], R], items: Items
    ) -> Iterator[tuple[Items, R]]:
        """Each batch of the items, in order, with what the call returned for it.

        Raises:
            MemoryError: a single item does not fit.
        """
        start = 0
        while start < len(items):
            batch = items[start : start + self.size]
            found = self._attempt(call, batch)
            if found is None:
                # Here and not where it was caught: the error held what the batch had occupied.
                _release()
                continue
            start += len(batch)
            yield batch, found[0]

    def _attempt(self, call: Callable[[Any], R], batch: Items) -> tuple[R] | None:
        try:
            return (call(batch),)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(batch) == 1:
                what = f"{self._what}: out of memory with a single item"
                raise MemoryError(f"{what}: {error}") from error
        self.size = len(batch) // 2
        log.warning(
            "%s: out of memory with %d items, going on with %d", self._what, len(batch), self.size
        )
        return None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a GPU or of this machine."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def gpu_lost(error: BaseException) -> bool:
    """Whether this process can use its GPU no more: after a failed assertion or a wrong access on
    the device every further call fails, until the process has ended."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, torch.AcceleratorError) or out_of_memory(error):
        return False
    try:
        torch.cuda.synchronize()
    except (AssertionError, RuntimeError):
        return True
    return False  # such as a kernel that could not be started


def _release() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
