"""What the engine costs a sample beside any network, in small sets and in large ones."""

from __future__ import annotations

import time
from typing import Any

from infra.ledger import ShardData, Stage
from infra.machine import peak_rss
from infra.ray_session import Embedded
from infra.runner import Resources, run_stages
from infra.shards import sample_key, write_tar
from infra.units import StageJob
from tests.benchmarks.data import empty_store
from tests.benchmarks.measure import Options, Record

ROWS = 1000
"""Samples of a shard."""
SIZES = (1_000, 10_000, 50_000)
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
    so that a ratio of 1 says that a sample costs the same in a large one."""
    _rate(SIZES[0])  # pays for imports
    found = {size: _rate(size) for size in SIZES}
    return [
        Record(
            name=f"scale.{size}", unit="samples/s", ours=rate, bare=found[SIZES[0]],
            shape={"samples": size, "shards": size // ROWS}, dtype="none", threads=options.threads,
            also={"us_per_sample": round(1e6 / rate, 1), "peak_mb": round(peak_rss() / 1e6, 1)},
        )
        for size, rate in found.items()
    ]  # fmt: skip


def _rate(samples: int) -> float:
    with empty_store() as store:
        job = StageJob(STAGE, "tests.benchmarks.scale:build", {}, tuple(range(samples // ROWS)))
        began = time.perf_counter()
        run_stages(store, [job], target=Embedded(), resources=Resources(workers=0))
        return round(samples / (time.perf_counter() - began), 1)
