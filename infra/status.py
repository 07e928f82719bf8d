"""How far every stage of a dataset is, read from the plan and the commits alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from datetime import datetime

from infra.ledger import Commit, Ledger
from infra.store import Store


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
    """Samples a second of wall-clock time, from the first commit's start to the last."""
    eta: float | None
    """Seconds until all shards are done at the pace so far; None with nothing to go by."""


def status(store: Store) -> list[StageStatus]:
    """Status of all stages found in the store, in the order in which they first committed.

    Raises:
        FileNotFoundError: the store holds no plan, hence no dataset.
    """
    ledger = Ledger(store)
    total = int(ledger.read_plan()["num_shards"])
    stages = {path.split("/")[1] for path in store.list("quarantine/")} | {*ledger.stage_ids()}
    commits = {stage: list(ledger.commits(stage).values()) for stage in stages}
    order = sorted(stages, key=lambda stage: (_first(commits[stage]), stage))
    return [
        _summary(stage, commits[stage], total, len(ledger.quarantined(stage))) for stage in order
    ]


def _first(commits: list[Commit]) -> str:
    return min((commit.created for commit in commits), default="~")


def _summary(stage: str, commits: list[Commit], total: int, quarantined: int) -> StageStatus:
    samples = sum(commit.samples for commit in commits)
    elapsed = _elapsed(commits)
    left = max(total - len(commits) - quarantined, 0)
    return StageStatus(
        stage=stage,
        done=len(commits),
        total=total,
        quarantined=quarantined,
        samples=samples,
        drops=dict(sum((Counter(commit.drops) for commit in commits), Counter())),
        seconds=sum(commit.seconds for commit in commits),
        rate=samples / elapsed if elapsed else 0.0,
        eta=elapsed / len(commits) * left if commits else None,
    )


def _elapsed(commits: list[Commit]) -> float:
    """Wall-clock seconds from the start of the first shard to the last commit."""
    ends = [(datetime.fromisoformat(c.created).timestamp(), c.seconds) for c in commits]
    if not ends:
        return 0.0
    return max(end for end, _ in ends) - min(end - seconds for end, seconds in ends)


def as_json(lines: list[StageStatus]) -> str:
    """The status for machines: a JSON list of objects."""
    return json.dumps([vars(line) for line in lines], indent=2)
