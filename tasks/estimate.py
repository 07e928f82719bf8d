"""What a dataset will take: shards, bytes, hours and GPU-hours of each stage, before it is spent.

Rates are those of this dataset's own commits, and where a stage has none yet the `ASSUMED` ones,
which are rough figures for one worker and say so in the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from infra.ledger import Commit, Ledger
from infra.store import Store
from models import modalities
from models.labelers import outputs
from models.labelers.base import COMPUTED
from models.labelers.networks import MODERN

Basis = Literal["measured", "assumed"]


@dataclass(frozen=True)
class Rate:
    """What one worker does in a stage."""

    per_second: float
    """Samples that enter the stage, for each second of a worker."""
    bytes: float
    """Stored bytes for each sample that enters."""
    kept: float = 1.0
    """Share of samples that come out."""
    basis: Basis = "assumed"


ASSUMED: dict[str, tuple[Rate, Rate]] = {
    "fetch": (Rate(40, 23_000, 0.62), Rate(40, 23_000, 0.62)),
    "distinct": (Rate(2000, 30_000, 0.99), Rate(2000, 30_000, 0.99)),
    "label:depth": (Rate(3, 60_000), Rate(100, 60_000)),
    "label:normal": (Rate(1, 90_000), Rate(60, 90_000)),
    "label:semseg": (Rate(1, 6_000), Rate(30, 6_000)),
    "label:det": (Rate(2, 1_500), Rate(40, 1_500)),
    "label:caption": (Rate(0.3, 1_100), Rate(40, 1_100)),
    "label:clip": (Rate(10, 300_000), Rate(500, 300_000)),
    "tokens": (Rate(15, 1_700), Rate(600, 1_700)),
    "text": (Rate(500, 400), Rate(500, 400)),
}
"""Stage to the rate of a worker that has one CPU core, and of one that has a GPU.

Order-of-magnitude figures for pictures of 256 px and the networks of the preset `modern`, four
crops of 196 tokens, or of a text, for which no network runs; `fetch` is 630 images/s on 16 cores at
62 % living links, as published for CC12M. A thousand rows of your own replace all of them with
measured ones.
"""
_COMPUTED, _NETWORK = (50.0, 50.0), (1.0, 50.0)
"""Pictures a second of other labelers, on one core and on a GPU: without and with a network."""
_BYTES = {"image": 23_000, "map": 50_000, "feature": 300_000, "vector": 2_000, "sequence": 1_500}
"""Of a label, by the kind of its modality; sequences that are no text are stored as vectors."""


@dataclass(frozen=True)
class Line:
    """One stage of the estimate; what is committed already is not counted."""

    stage: str
    shards: int
    """Shards left to do."""
    samples: int
    """Samples left to do, about."""
    bytes: int
    """Bytes still to be stored."""
    hours: float
    """Wall-clock hours with all workers."""
    gpu_hours: float
    basis: Basis


@dataclass
class _Sums:
    """Of the commits of a stage, whatever its fingerprint."""

    samples: int = 0
    dropped: int = 0
    seconds: float = 0.0
    bytes: int = 0

    def add(self, commit: Commit) -> None:
        """Take up one commit."""
        self.samples += commit.samples
        self.dropped += sum(commit.drops.values())
        self.seconds += commit.worker_seconds
        self.bytes += sum(o["bytes"] for o in (*commit.outputs.values(), commit.status))


def rates(store: Store) -> dict[str, Rate]:
    """The measured rate of each stage of a dataset, by the stage's name without fingerprint."""
    ledger = Ledger(store)
    found: dict[str, _Sums] = {}
    for stage in ledger.stage_ids():
        sums = found.setdefault(stage.rpartition("@")[0], _Sums())
        for commit in ledger.each_commit(stage):
            sums.add(commit)
    measured = ((name, _measured(name, sums)) for name, sums in found.items())
    return {name: rate for name, rate in measured if rate is not None}


def _measured(name: str, sums: _Sums) -> Rate | None:
    """None where nothing was measured: no samples, or no time."""
    # A label's hole is dropped and stays a sample; a row that was not fetched is no sample.
    dropped = sums.dropped if name in ("fetch", "distinct") else 0
    entered = sums.samples + dropped
    if not entered or not sums.seconds:
        return None
    per_second, stored = entered / sums.seconds, sums.bytes / entered
    return Rate(per_second, stored, sums.samples / entered, "measured")


def assumed(stage: str, *, gpu: bool) -> Rate:
    """The rate that is taken where none was measured; of tokens, that of a network or of words."""
    kind, _, name = stage.partition(":")
    form = modalities.text_form(name)
    words = kind == "tokens" and form is not None and form.parts is None
    if kind == "label" and stage not in ASSUMED:
        return _labels(name, gpu)
    return ASSUMED.get(stage, ASSUMED["text" if words else "tokens"])[int(gpu)]


def _labels(name: str, gpu: bool) -> Rate:
    network = MODERN.get(name)
    computed = network is not None and network.model_id == COMPUTED
    stored = sum(map(_label_bytes, outputs(name)))
    return Rate((_COMPUTED if computed else _NETWORK)[int(gpu)], stored)


def _label_bytes(name: str) -> int:
    known = name in modalities.names() and not modalities.is_embedded(name)
    return _BYTES[modalities.get(name).kind if known else "map"]


def estimate(
    stages: Sequence[str],
    *,
    rows: int,
    shards: int,
    done: dict[str, int],
    measured: dict[str, Rate],
    workers: int,
    gpus: float = 0.0,
) -> list[Line]:
    """What the stages will take, in their order.

    Args:
        stages: names such as fetch, label:depth, tokens:rgb.
        rows: rows of the list.
        shards: shards of the plan.
        done: committed shards of each stage; none for a stage that is not named.
        measured: see `rates`.
        workers: workers that run at once.
        gpus: GPUs of each worker in labels and tokens.
    """
    lines, entering = [], float(rows)
    for stage in stages:
        on_gpu = gpus > 0 and stage.partition(":")[0] in ("label", "tokens")
        rate = measured.get(stage) or assumed(stage, gpu=on_gpu)
        left = max(shards - done.get(stage, 0), 0)
        samples = entering * left / shards if shards else 0.0
        hours = samples / rate.per_second / workers / 3600
        lines.append(
            Line(
                stage=stage,
                shards=left,
                samples=round(samples),
                bytes=round(samples * rate.bytes),
                hours=hours,
                gpu_hours=hours * workers * gpus if on_gpu else 0.0,
                basis=rate.basis,
            )
        )
        if stage in ("fetch", "distinct"):
            entering *= rate.kept
    return lines


def total(lines: Iterable[Line]) -> dict[str, Any]:
    """Sums of bytes, hours and GPU-hours; stages run one after another."""
    lines = list(lines)
    return {
        "bytes": sum(line.bytes for line in lines),
        "hours": sum(line.hours for line in lines),
        "gpu_hours": sum(line.gpu_hours for line in lines),
    }
