"""How far every stage of a dataset is, read from the plan and the commits alone."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from infra.store import Store

READERS = 16
"""Threads that read commits: on S3 each read is a round trip."""


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
    total = int(store.read_json("plan/plan.json")["num_shards"])
    commits = _by_stage(store.list("commits/"))
    quarantine = _by_stage(store.list("quarantine/"))
    found = []
    with ThreadPoolExecutor(READERS) as pool:
        for stage in sorted({*commits, *quarantine}):
            records = list(pool.map(store.read_json, commits[stage].values()))
            shards = quarantine[stage].keys() - commits[stage].keys()
            found.append((_first(records), _summary(stage, records, total, len(shards))))
    return [line for _, line in sorted(found, key=lambda pair: pair[0])]


def _by_stage(paths: Iterable[str]) -> defaultdict[str, dict[int, str]]:
    """ "commits/<stage id>/shard-000123.json" -> {stage id: {123: path}}"""
    found: defaultdict[str, dict[int, str]] = defaultdict(dict)
    for path in paths:
        match = re.fullmatch(r"[^/]+/(.+)/shard-(\d+)\.json", path)
        if match:
            found[match[1]][int(match[2])] = path
    return found


def _first(records: list[dict[str, Any]]) -> str:
    return min((record["created"] for record in records), default="~")


def _summary(
    stage: str, records: list[dict[str, Any]], total: int, quarantined: int
) -> StageStatus:
    drops: defaultdict[str, int] = defaultdict(int)
    for record in records:
        for reason, number in record["drops"].items():
            drops[reason] += number
    samples = sum(record["samples"] for record in records)
    elapsed = _elapsed(records)
    left = total - len(records) - quarantined
    return StageStatus(
        stage=stage,
        done=len(records),
        total=total,
        quarantined=quarantined,
        samples=samples,
        drops=dict(drops),
        seconds=sum(record["seconds"] for record in records),
        rate=samples / elapsed if elapsed else 0.0,
        eta=elapsed / len(records) * max(left, 0) if records else None,
    )


def _elapsed(records: list[dict[str, Any]]) -> float:
    """Wall-clock seconds from the start of the first shard to the last commit."""
    if not records:
        return 0.0
    ends = [(datetime.fromisoformat(r["created"]).timestamp(), r["seconds"]) for r in records]
    return max(end for end, _ in ends) - min(end - seconds for end, seconds in ends)


def as_json(lines: list[StageStatus]) -> str:
    """The status for machines: a JSON list of objects."""
    return json.dumps([vars(line) for line in lines], indent=2)
