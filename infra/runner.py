"""The one stage runner: units of work in, commits out, on Ray Data or in this process.

A *unit* is one shard of one stage. Whatever happens to a unit, it ends in exactly one way:

    committed      its `Work` returned and the ledger holds the commit
    quarantined    it failed or killed its worker `MAX_ATTEMPTS` times; the ledger holds the reason
    to do          the run was cancelled or aborted first; the next run takes it up

Every attempt is recorded in the store *before* it begins, since Ray repeats without end a unit
whose worker dies. Only attempts of this run count: cancelling a run many times harms no unit.
Rows of the Ray Data pipeline are units and small status rows, so that the driver's memory does
not depend on the size of the data, and `workers=0` runs the same code without Ray.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from infra.ledger import Ledger, Stage
from infra.overlap import percentages
from infra.ray_session import Embedded, RayTarget, ray_session
from infra.store import Store
from infra.turns import keeper
from infra.units import (
    StageJob,
    SystemicFailure,
    UnitRunner,
    UnitStatus,
    Work,
    as_worker,
    worker_variables,
)

if TYPE_CHECKING:
    from ray.data import Dataset

__all__ = [
    "Resources",
    "RunProgress",
    "StageJob",
    "StageReport",
    "SystemicFailure",
    "Work",
    "run_stages",
]

log = logging.getLogger("fourm.runner")

MAX_BLOCKS = 4096
"""Blocks of a Ray dataset, each of which costs its driver time and memory. Up to so many units are
a block each; of more, a worker takes several in a row."""


@dataclass(frozen=True)
class Resources:
    """Workers of a run and what each occupies."""

    workers: int | None = 1
    """0 runs in this process without Ray; None: as many as Ray's nodes have room for."""
    num_cpus: float = 1
    num_gpus: float = 0
    threads: int = 1
    """Torch and OpenMP threads a worker. Keep it at num_cpus: more threads than cores are slow.
    0: both as Ray's nodes have cores for each worker."""
    accelerator: str = ""
    """Type of accelerator, as Ray names it, of the nodes that workers are placed on; empty: any."""

    def __post_init__(self) -> None:
        if min(self.workers or 0, self.threads, self.num_cpus, self.num_gpus) < 0:
            raise ValueError(f"resources must not be negative: {self}")
        if self.workers == 0 and self.threads == 0:
            raise ValueError(f"without Ray's nodes threads must be at least 1: {self}")
        if self.accelerator and not self.num_gpus:
            raise ValueError(f"accelerator {self.accelerator!r} without num_gpus: {self}")

    def on(self, nodes: Sequence[Mapping[str, float]]) -> Resources:
        """The same with what was left open filled in, as these nodes have room: at least one
        worker with one core, since a cluster may have to grow for it.

        Args:
            nodes: of each what Ray calls its resources, such as {"CPU": 16, "GPU": 2}.
        """
        one = replace(self, threads=1, num_cpus=1)
        workers = self.workers or max(1, (self if self.threads else one).room(nodes))
        if self.threads:
            return replace(self, workers=workers)
        most = max((int(node.get("CPU", 0)) for node in nodes), default=1)
        shares = (replace(one, threads=n, num_cpus=n) for n in range(most, 1, -1))
        share = next((share for share in shares if share.room(nodes) >= workers), one)
        return replace(share, workers=workers)

    def room(self, nodes: Iterable[Mapping[str, float]]) -> int:
        """Workers that the nodes have room for, however many are asked for."""
        kind = f"accelerator_type:{self.accelerator}"
        needs = [("CPU", self.num_cpus), ("GPU", self.num_gpus)]
        return sum(
            min((int(node.get(name, 0) / need) for name, need in needs if need), default=1 << 20)
            for node in nodes
            if not self.accelerator or kind in node
        )


@dataclass
class StageReport:
    """What a run did for one stage."""

    done: int = 0
    """Shards committed by this run."""
    skipped: int = 0
    """Shards that were committed before."""
    quarantined: dict[int, str] = field(default_factory=dict)
    """Shard to reason, of this run and of earlier ones."""
    failed: int = 0
    """Shards quarantined by this run."""
    samples: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    """Samples dropped, by reason class."""
    seconds: float = 0.0
    """Wall-clock from the end of the stage before (or the start of the run) to the last shard."""
    spent: float = 0.0
    """Time of the work, summed over shards."""
    waited: dict[str, float] = field(default_factory=dict)
    """Seconds of it in which the work was held up, by what it waited for."""

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def waits(self) -> dict[str, float]:
        """Shares of the work in which it was held up, by what it waited for."""
        return {what: seconds / max(self.spent, 1e-9) for what, seconds in self.waited.items()}


@dataclass(frozen=True)
class RunProgress:
    """A snapshot handed to `on_progress` after each finished unit."""

    stage: str
    """Name of the stage the unit belongs to."""
    done: int
    """Units finished by this run, over all stages."""
    total: int
    samples: int
    drops: int
    quarantined: int
    seconds: float
    waits: dict[str, float] = field(default_factory=dict)
    """Of the stage's `StageReport`."""

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def eta(self) -> float:
        """Seconds still to go at the pace so far."""
        return self.seconds / self.done * (self.total - self.done) if self.done else float("inf")

    @property
    def text(self) -> str:
        parts = [f"{self.stage} {self.done}/{self.total} shards"]
        parts.append(f"{self.samples} samples, {self.samples_per_second:.1f}/s")
        if self.drops:
            parts.append(f"{self.drops} dropped")
        if self.quarantined:
            parts.append(f"{self.quarantined} quarantined")
        if self.waits:
            parts.append(f"waited for {percentages(self.waits)}")
        if self.done < self.total:
            parts.append(f"{self.eta:.0f} s to go")
        return ", ".join(parts)


def run_stages(
    store: Store,
    jobs: list[StageJob],
    *,
    target: RayTarget,
    resources: Resources,
    on_progress: Callable[[RunProgress], None] | None = None,
) -> dict[str, StageReport]:
    """Bring every shard of the jobs to commit or quarantine; stages run one after another.

    Nothing to do returns at once, without Ray. Interrupting (KeyboardInterrupt, or the exception
    that Prefect raises on cancelling) ends Ray and the workers at once; the same call resumes.

    Returns:
        stage id -> report, in the order of the jobs.

    Raises:
        SystemicFailure: a work said that no unit can succeed, or could not be built at all.
        ValueError: the target has too little CPU or GPU for even one worker.
    """
    ledger = Ledger(store)
    reports: dict[str, StageReport] = {}
    todo: list[dict[int, int]] = []
    for job in jobs:
        left = ledger.todo(job.stage, job.shards)
        # Attempts of earlier runs count no more.
        before = ledger.begun(job.stage) if left else Counter[int]()
        todo.append({shard: before[shard] for shard in left})
        bad = ledger.quarantined(job.stage)
        bad = {shard: bad[shard] for shard in job.shards if shard in bad}
        skipped = len(job.shards) - len(left) - len(bad)
        reports[job.stage.id] = StageReport(skipped=skipped, quarantined=bad)
    units = list(_units(jobs, todo))
    if not units:
        log.info("nothing to do: every shard of %s is committed or quarantined", list(reports))
        return reports
    # Workers are told their shards one at a time.
    told = [replace(job, shards=()) for job in jobs]
    arguments = {"store": store, "jobs": told, "threads": resources.threads}
    if resources.workers == 0:
        rows = _run_here(units, arguments)
    else:
        rows = _run_on_ray(units, arguments, target, resources)
    with closing(rows):
        _collect(rows, jobs, reports, sum(map(len, todo)), on_progress)
    return reports


def _units(jobs: list[StageJob], todo: list[dict[int, int]]) -> Iterator[dict[str, Any]]:
    """The arguments of `UnitRunner.run`: a unit for each shard that jobs which share it lack."""
    sharing: dict[str, list[int]] = {}
    for number, job in enumerate(jobs):
        sharing.setdefault(job.share or f"alone {number}", []).append(number)
    for members in sharing.values():
        for shard in dict.fromkeys(shard for job in members for shard in todo[job]):
            parts = [[job, todo[job][shard]] for job in members if shard in todo[job]]
            yield {"shard": shard, "parts": json.dumps(parts)}


def _collect(
    rows: Iterable[UnitStatus],
    jobs: list[StageJob],
    reports: dict[str, StageReport],
    total: int,
    on_progress: Callable[[RunProgress], None] | None,
) -> None:
    """Fold status rows into the reports, and tell of each."""
    began = last = time.monotonic()
    starts: dict[str, float] = {}
    for done, row in enumerate(rows, start=1):
        if row.state == "aborted":
            raise SystemicFailure(row.reason)
        stage = jobs[row.job].stage
        report = reports[stage.id]
        start, last = starts.setdefault(stage.id, last), time.monotonic()
        report.seconds = last - start
        report.samples += row.samples
        report.drops.update(json.loads(row.drops))
        report.spent += row.seconds
        for what, seconds in json.loads(row.waited).items():
            report.waited[what] = report.waited.get(what, 0.0) + seconds
        if row.state == "committed":
            report.done += 1
        else:
            report.failed += 1
            report.quarantined[row.shard] = row.reason
            log.warning("%s shard %d quarantined: %s", stage.name, row.shard, row.reason)
        if on_progress:
            on_progress(_snapshot(stage, done, total, reports, last - began))


def _snapshot(
    stage: Stage, done: int, total: int, every: dict[str, StageReport], seconds: float
) -> RunProgress:
    reports = every.values()
    return RunProgress(
        stage=stage.name,
        done=done,
        total=total,
        samples=sum(r.samples for r in reports),
        drops=sum(r.drops.total() for r in reports),
        quarantined=sum(len(r.quarantined) for r in reports),
        seconds=seconds,
        waits=every[stage.id].waits,
    )


def _run_here(
    units: list[dict[str, Any]], arguments: dict[str, Any]
) -> Generator[UnitStatus, None, None]:
    with as_worker(arguments["threads"], _run_id()), closing(UnitRunner(**arguments)) as runner:
        for unit in units:
            yield from runner.run(**unit)


def _run_id() -> str:
    """Names the run in its commits: the Prefect flow run where there is one."""
    run_id = os.environ.get("FOURM_RUN_ID", "")
    if not run_id and "prefect" in sys.modules:
        from prefect.runtime import flow_run

        run_id = flow_run.id or ""
    return run_id or uuid.uuid4().hex


# --- Ray --------------------------------------------------------------------------------------


def _run_on_ray(
    units: list[dict[str, Any]],
    arguments: dict[str, Any],
    target: RayTarget,
    resources: Resources,
) -> Generator[UnitStatus, None, None]:
    """Status rows of the units as they finish.

    Closing the iterator ends the session that it began, and with it the workers at once. Workers
    in a session of the caller's finish the unit at hand first.
    """
    import ray

    with ray_session(target):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        resources = resources.on(nodes)
        workers = min(len(units), resources.workers or 1)
        if isinstance(target, Embedded):
            workers = _that_fit(workers, resources, target, ray.cluster_resources())
        elif (room := resources.room(nodes)) < workers:
            log.warning("the cluster has room for %d of %d workers as yet; the others wait until "
                        "it has grown", room, workers)
        arguments = arguments | {"threads": resources.threads}
        with keeper(max(job.turns for job in arguments["jobs"]), workers) as turns:
            variables = worker_variables(resources.threads, _run_id(), turns)
            rows = _dataset(units, arguments, resources, workers, variables)
            for batch in rows.iter_batches(batch_size=None, prefetch_batches=0):
                columns = {name: column.tolist() for name, column in batch.items()}
                for values in zip(*columns.values(), strict=True):
                    yield UnitStatus(**dict(zip(columns, values, strict=True)))


def _dataset(
    units: list[dict[str, Any]],
    arguments: dict[str, Any],
    resources: Resources,
    workers: int,
    variables: dict[str, str],
) -> Dataset:
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # It warns that progress bars are off, as asked for below.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    at_once = min(job.at_once for job in arguments["jobs"])
    at_once = min(at_once, -(-len(units) // workers))
    source = ray.data.from_items(units, override_num_blocks=min(len(units), MAX_BLOCKS))
    context = source.context
    context.enable_progress_bars = False
    # A unit may take hours, and a worker may wait for its GPU.
    context.execution_no_progress_timeout_s = -1
    return source.map_batches(
        UnitRunner,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            size=workers,
            # None waits behind a slow one while other workers are idle. Handing over a unit takes
            # milliseconds, and a unit seconds to hours.
            max_tasks_in_flight_per_actor=at_once,
            max_concurrent_calls_per_actor=at_once,
            enable_true_multi_threading=at_once > 1,
        ),
        fn_constructor_kwargs={**arguments, "replaced": True},
        num_cpus=resources.num_cpus,
        num_gpus=resources.num_gpus or None,
        **({"accelerator_type": resources.accelerator} if resources.accelerator else {}),
        runtime_env={"env_vars": variables},
    )


def _that_fit(
    wanted: int, resources: Resources, target: Embedded, available: dict[str, float]
) -> int:
    """Workers that the machine has room for: Ray would wait for the others without end."""
    fit = wanted
    types = [name.partition(":")[2] for name in available if name.startswith("accelerator_type:")]
    if resources.accelerator and resources.accelerator not in types:
        raise ValueError(f"Ray has no accelerator {resources.accelerator!r}; it has "
                         f"{', '.join(types) or 'none'}")
    for name, need in (("CPU", resources.num_cpus), ("GPU", resources.num_gpus)):
        have = available.get(name, 0)
        if need > have:
            raise target.too_small("a worker", need, name, have)
        fit = min(fit, int(have / need)) if need else fit
    if fit < wanted:
        log.warning("room for %d of the %d workers asked for", fit, wanted)
    return fit
