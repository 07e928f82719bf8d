"""What every benchmark shares: its options, how it takes time, and the record it leaves."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from infra.machine import Products, commit_hash, describe

MIN_ROUNDS = 2
Call = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a benchmark is run."""

    dtype: Products
    """Of matrix products: fp32, tf32 (training only) or bf16 under autocast."""
    threads: int = 1
    """CPU threads of torch; reading and encoding threads of the engine come on top."""
    seconds: float = 5.0
    """Least time spent measuring, over all sides of a comparison."""
    peer: str = ""
    """What is measured beside ours: the folder of a checkout of the released code, or the name of
    another program."""
    peer_python: str = ""
    """Interpreter that has that program."""
    rows: int = 40_000
    """Length of the list that is downloaded."""
    sizes: Sequence[str] = ("tiny",)
    """Networks of 4M-7 that are measured, see `seven.SIZES`."""
    only: str = ""
    """Measure only records whose name holds this."""
    compile: bool = False
    """Whether the blocks of trained networks are compiled."""


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
        """The fields, ratio = ours / peer or bare, and machine, load, commit and date as JSON
        types."""
        other = self.bare if self.peer is None else self.peer
        ratio = None if other is None else round(self.ours / other, 3)
        return {
            **asdict(self),
            "ratio": ratio,
            "machine": describe(),
            "load": round(os.getloadavg()[0], 2),
            "commit": commit_hash(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }


@contextmanager
def under_way(name: str) -> Iterator[None]:
    """Tells on stderr that something begins, and how long it took."""
    began = time.perf_counter()
    print(f"{name} ...", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        took = time.perf_counter() - began
        print(f"{name} took {took:.0f} s", file=sys.stderr, flush=True)


def cases(named: Mapping[str, Callable[[], Record]], only: str) -> list[Record]:
    """Measures one after the other what has a name that holds `only`, or is it."""
    records = []
    for name, measured in named.items():
        if name == only or (only in name and only not in named):
            with under_way(name):
                records.append(measured())
    return records


def rates(calls: Sequence[Call], units: float, seconds: float) -> list[float]:
    """Units/s of each call: medians over rounds, see `rounds`."""
    return [round(units / statistics.median(taken), 2) for taken in rounds(calls, seconds)]


def rounds(calls: Sequence[Call], seconds: float) -> list[list[float]]:
    """Seconds that each call took, round by round, without the first round.

    A round runs every call once, so that other load on the machine meets all of them alike. A call
    that runs elsewhere returns the seconds it took there, as a float.
    """
    found: list[list[float]] = [[] for _ in calls]
    began = time.perf_counter()
    while len(found[0]) <= MIN_ROUNDS or time.perf_counter() - began < seconds:
        for call, taken in zip(calls, found, strict=True):
            start = time.perf_counter()
            own = call()
            wall = time.perf_counter() - start
            taken.append(own if isinstance(own, float) else wall)
    return [taken[1:] for taken in found]
