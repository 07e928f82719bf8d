"""What the engine costs a sample beside any network, in small sets and in large ones."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

from infra.ledger import ShardData, Stage
from infra.ray_session import Embedded
from infra.runner import Resources, run_stages
from infra.shards import sample_key, write_tar
from infra.units import StageJob
from tests.benchmarks.data import empty_store
from tests.benchmarks.measure import Options, Record, rounds

ROWS = 1000
"""Samples of a shard."""
SIZES = (1_000, 10_000, 50_000)
EVEN = 20_000
"""Samples of a round, at least, so that small sets are timed as well as large ones."""
STAGE = Stage("label:toy", 1, {}, ("toy",))


class Words:
    """Writes a few bytes for each sample."""

    def run(self, shard: int) -> ShardData:
        """One shard."""
        keys = [sample_key(shard, row) for row in range(ROWS)]
        tar = write_tar((f"{key}.txt", key.encode()) for key in keys)
        return ShardData(keys, {"toy": tar}, [(key, "ok", "") for key in keys], 0.0)


def build(_store_url: str, _stage: Stage, _config: dict[str, Any]) -> Words:
    """The factory of the job."""
    return Words()


def scale(options: Options) -> list[Record]:
    """Samples/s of the stage runner with a trivial stage; `bare` is the rate of the smallest set,
    so that a ratio of 1 says that a sample costs the same in a large one.

    Sets of all sizes are made in turn, so that other load on the machine meets all of them alike.
    """
    spent: dict[int, list[float]] = {size: [] for size in SIZES}
    calls = [partial(_seconds, size, spent[size]) for size in SIZES]
    taken = rounds(calls, options.seconds * len(SIZES))
    found = {size: round(size / statistics.median(each), 1)
             for size, each in zip(SIZES, taken, strict=True)}
    return [
        Record(
            name=f"scale.{size}", unit="samples/s", ours=rate, bare=found[SIZES[0]],
            shape={"samples": size, "shards": size // ROWS, "rounds": len(taken[0])},
            dtype="none", threads=options.threads,
            also={"us_per_sample": round(1e6 / rate, 1),
                  "cpu_us_per_sample": round(1e6 * statistics.median(spent[size]) / size, 1)},
        )
        for size, rate in found.items()
    ]  # fmt: skip


def _seconds(samples: int, spent: list[float]) -> float:
    """Seconds that a set of so many samples takes, the median over several small ones; their CPU
    seconds are added to `spent`."""
    taken = []
    for _ in range(max(1, EVEN // samples)):
        with empty_store() as store:
            job = StageJob(STAGE, "tests.benchmarks.scale:build", {}, tuple(range(samples // ROWS)))
            began, cpu = time.perf_counter(), time.process_time()
            run_stages(store, [job], target=Embedded(), resources=Resources(workers=0))
            taken.append(time.perf_counter() - began)
            spent.append(time.process_time() - cpu)
    return statistics.median(taken)
