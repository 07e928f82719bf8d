"""How far every stage of a dataset is, read from the plan and the commits alone.

Commits are folded one by one, so that the memory it takes does not depend on their number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from infra.ledger import Commit, Ledger
from infra.overlap import percentages
from infra.store import Store

PAUSE_SECONDS = 300.0
"""A stretch without any shard under way that is longer is a pause between runs, not work."""


@dataclass(frozen=True)
class StageStatus:
    """One line of `fourm status`."""

    stage: str
    """Stage id, "name@fingerprint"; an outdated fingerprint shows as a stage of its own."""
    done: int
    total: int
    quarantined: int
    samples: int
    drops: dict[str, int]
    """Samples dropped, by reason class."""
    seconds: float
    """Worker time spent, summed over shards."""
    rate: float
    """Samples a second of wall-clock time, pauses between runs left out."""
    eta: float | None
    """Seconds until all shards are done at the pace so far; None with nothing to go by."""
    failed: dict[str, int] = field(default_factory=dict)
    """Quarantined shards by class: the name of the error, or "worker died"."""
    workers: float = 0.0
    """Workers that were busy on average."""
    slowest: tuple[int, float] | None = None
    """Shard that took longest, and its seconds."""
    begun: int = 0
    """Shards that were begun and have not ended: under way, or broken off with their run."""
    waited: dict[str, float] = field(default_factory=dict)
    """Shares of the worker time in which work was held up, by what it waited for."""
    queues: dict[str, float] = field(default_factory=dict)
    """How much was at each place of a worker, on average."""
    bytes: int = 0
    """What its shards occupy."""

    @property
    def left(self) -> int:
        """Shards that are neither committed nor quarantined."""
        return max(self.total - self.done - self.quarantined, 0)


def status(store: Store, stages: Collection[str] | None = None) -> list[StageStatus]:
    """Status of stages, in the order in which they first committed.

    Args:
        stages: ids; None for all that are found in the store.

    Raises:
        FileNotFoundError: the store holds no plan, hence no dataset.
    """
    ledger = Ledger(store)
    total = int(ledger.read_plan()["num_shards"])
    if stages is None:
        stages = {*ledger.quarantines(), *ledger.stage_ids()}
    folds = {stage: _Fold() for stage in stages}
    for stage, fold in folds.items():
        for commit in ledger.each_commit(stage):
            fold.add(commit)
    order = sorted(stages, key=lambda stage: (folds[stage].first, stage))
    return [folds[stage].line(stage, total, ledger) for stage in order]


class _Fold:
    """Sums over the commits of a stage."""

    def __init__(self) -> None:
        self.first = "~"
        self.samples = self.bytes = 0
        self.seconds = 0.0
        self.drops: Counter[str] = Counter()
        self.slowest: tuple[int, float] | None = None
        self.waited, self.queues = _Means(), _Means()
        self.shards: set[int] = set()
        self.spans: list[tuple[float, float]] = []

    def add(self, commit: Commit) -> None:
        """Take up one commit."""
        end = datetime.fromisoformat(commit.created).timestamp()
        self.first = min(self.first, commit.created)
        self.samples += commit.samples
        self.bytes += sum(output["bytes"] for output in commit.outputs.values())
        self.seconds += commit.worker_seconds
        self.drops.update(commit.drops)
        self.spans.append((end - commit.seconds, end))
        self.shards.add(commit.shard)
        self.waited.add(commit.waited, commit.seconds)
        self.queues.add({at: n * commit.seconds for at, n in commit.queues.items()}, commit.seconds)
        if self.slowest is None or commit.seconds > self.slowest[1]:
            self.slowest = (commit.shard, commit.seconds)

    def line(self, stage: str, total: int, ledger: Ledger) -> StageStatus:
        """The status of the stage."""
        quarantined = ledger.quarantined(stage)
        elapsed, done = self._elapsed(), len(self.spans)
        left = max(total - done - len(quarantined), 0)
        begun = ledger.begun(stage).keys() - self.shards - quarantined.keys() if left else ()
        return StageStatus(
            stage=stage,
            done=done,
            total=total,
            quarantined=len(quarantined),
            samples=self.samples,
            drops=dict(self.drops),
            seconds=self.seconds,
            rate=self.samples / elapsed if elapsed else 0.0,
            eta=elapsed / done * left if done else None,
            failed=dict(Counter(map(failure_class, quarantined.values()))),
            workers=self.seconds / elapsed if elapsed else 0.0,
            slowest=self.slowest,
            begun=len(begun),
            waited=self.waited.values(),
            queues=self.queues.values(),
            bytes=self.bytes,
        )

    def _elapsed(self) -> float:
        """Wall-clock seconds in which shards were under way, pauses between runs left out."""
        elapsed = 0.0
        until: float | None = None
        for start, end in sorted(self.spans):
            if until is None or start - until > PAUSE_SECONDS:
                elapsed += end - start
                until = end
            elif end > until:
                elapsed += end - until
                until = end
        return elapsed


class _Means:
    """Means over the time of those commits that tell; older ones do not."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._seconds = 0.0

    def add(self, sums: dict[str, float], seconds: float) -> None:
        """Take up the sums over so many seconds."""
        self._seconds += seconds if sums else 0.0
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def values(self) -> dict[str, float]:
        """The means by name."""
        return {name: value / max(self._seconds, 1e-9) for name, value in self._sums.items()}


def failure_class(reason: str) -> str:
    """The class of a quarantine's reason: an error's name, "worker died", or its first words.

    >>> failure_class("3 attempts failed: ValueError: shard 1 is broken")
    'ValueError'
    """
    text = reason.partition("attempts failed: ")[2] or reason
    if text.startswith("the worker died"):
        return "worker died"
    return text.partition(":")[0].strip()[:40] or "unknown"


def as_rows(lines: Collection[StageStatus]) -> list[dict[str, Any]]:
    """The status for people: a row for each stage, every value a number or a short text."""
    return [
        {
            "stage": line.stage,
            "done": f"{line.done}/{line.total}",
            "left": line.left,
            "begun": line.begun,
            "failed": _counts(line.failed),
            "samples": line.samples,
            "dropped": _counts(line.drops),
            "stored": size(line.bytes),
            "samples/s": round(line.rate, 1),
            "workers": round(line.workers, 1),
            "spent": duration(line.seconds),
            "time left": duration(line.eta) if line.left else "",
            "waited for": percentages(line.waited),
            "at work": _amounts(line.queues),
            "slowest": f"{line.slowest[0]}: {duration(line.slowest[1])}" if line.slowest else "",
        }
        for line in lines
    ]


def _amounts(means: dict[str, float]) -> str:
    return ", ".join(f"{at.replace('_', ' ')} {amount:.3g}" for at, amount in means.items())


def size(number: float) -> str:
    """Bytes as "12 MB".

    >>> size(2_500_000)
    '2 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds as "1:02:03" or "2:03"; "?" for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _counts(numbers: dict[str, int], most: int = 4) -> str:
    """The largest numbers with their names."""
    found = sorted(numbers.items(), key=lambda item: (-item[1], item[0]))
    rest = f", {len(found) - most} more" if len(found) > most else ""
    return ", ".join(f"{name} {number}" for name, number in found[:most]) + rest
