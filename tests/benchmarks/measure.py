"""What every benchmark shares: its options, how it takes time, and the record it leaves."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from infra.machine import commit_hash, describe

MIN_ROUNDS = 2


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a benchmark is run."""

    dtype: str
    """fp32 or bf16: of matrix products, under autocast."""
    threads: int = 1
    """CPU threads of torch; reading and encoding threads of the engine come on top."""
    seconds: float = 5.0
    """Least time spent measuring, over all sides of a comparison."""
    peer: str = ""
    """Program to measure beside ours, where the benchmark knows one."""
    peer_python: str = ""
    """Interpreter that has it."""
    rows: int = 40_000
    """Length of the list that is downloaded."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A measured rate and what a reader needs to judge it."""

    name: str
    unit: str
    ours: float
    """Of the engine, in `unit`: the median of the rounds."""
    bare: float | None = None
    """The same work by the network alone, where that can be told apart."""
    peer: float | None = None
    """The same work by another program, where that was asked for."""
    shape: dict[str, Any]
    dtype: str
    threads: int
    also: dict[str, float] = field(default_factory=dict)
    """Further figures of the same run."""

    def to_dict(self) -> dict[str, Any]:
        """The fields, ratio = ours / bare or peer, machine, load, commit and date as JSON types."""
        other = self.bare or self.peer
        ratio = None if other is None else round(self.ours / other, 3)
        return {
            **asdict(self),
            "ratio": ratio,
            "machine": describe(),
            "load": round(os.getloadavg()[0], 2),
            "commit": commit_hash(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def rates(calls: Sequence[Callable[[], Any]], units: float, seconds: float) -> list[float]:
    """Units/s of each call: medians over rounds, after one call of each that is not counted.

    A round runs every call once, so that other load on the machine meets all of them alike.
    """
    for call in calls:
        call()
    found: list[list[float]] = [[] for _ in calls]
    began = time.perf_counter()
    while len(found[0]) < MIN_ROUNDS or time.perf_counter() - began < seconds:
        for call, each in zip(calls, found, strict=True):
            start = time.perf_counter()
            call()
            each.append(units / (time.perf_counter() - start))
    return [round(statistics.median(each), 2) for each in found]
