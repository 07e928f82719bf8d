"""What all flows share: one Prefect task for each stage, its retries, and its report.

Never a task for a shard: Prefect's server records some ten tasks a second, a dataset has thousands
of shards. A stage resumes from the ledger, so repeating its task costs only unfinished shards.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from infra import ui
from infra.ledger import Ledger
from infra.overlap import percentages
from infra.runner import RunProgress, StageJob, StageReport, run_stages
from infra.status import as_rows, failure_class, status
from infra.store import Store, StoreConflict, json_bytes
from pipelines import remote
from pipelines.params import Compute, LabelerResources, Where
from pipelines.workers import resources, unasked
from tasks.chain import made_otherwise

logger = logging.getLogger("fourm.flows")
# Prefect sends our log to its server, from the level on that ours has: WARNING if nobody sets it.
if logging.getLogger("fourm").level == logging.NOTSET:
    logging.getLogger("fourm").setLevel(logging.INFO)
W = TypeVar("W", bound=Where)
R = TypeVar("R")

SECONDS = "reports/seconds.json"
STATUS_SECONDS = 60.0
"""Least time between two status tables of a run."""
_LIGHT = frozenset({"plan", "label previews"})
"""Tasks that only read a little: they stay in the flow's process when the work is a Ray job."""


def stage_task(
    name: str, *, counted: bool = True
) -> Callable[[Callable[[W], R]], Task[[W], R]]:
    """A Prefect task for a whole stage: infrastructure trouble is retried, bad values are not.

    Results are not cached: the ledger knows what is done. Where it is `counted`, the time it takes
    is added to what the dataset has cost so far.
    """

    def decorate(stage: Callable[[W], R]) -> Task[[W], R]:
        @functools.wraps(stage)
        def timed_stage(params: W) -> R:
            if name not in _LIGHT and remote.is_remote(params):
                return remote.run(stage, params)
            with timed(Store(params.root), name) if counted else nullcontext():
                return stage(params)

        return task(
            name=name,
            retries=2,
            retry_delay_seconds=[10, 60],
            retry_jitter_factor=0.5,
            retry_condition_fn=_worth_a_retry,
            cache_policy=NO_CACHE,
            persist_result=False,
        )(timed_stage)

    return decorate


def _worth_a_retry(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    return not isinstance(state.result(raise_on_failure=False), remote.FINAL)


def run_jobs(
    store: Store,
    jobs: list[StageJob],
    compute: Compute,
    title: str,
    pictures: Callable[[], None] = lambda: None,
    own: LabelerResources | None = None,
) -> list[dict[str, Any]]:
    """Run stages and show them: a progress bar and a status meanwhile, a table at the end.

    Args:
        store: The dataset.
        jobs: Of the stages.
        compute: Where they run.
        title: Of the bar and the table.
        pictures: Shows what is new of the stages' results; called now and then, and at the end.
        own: What these stages get instead of what all do.

    Returns:
        A row for each stage: stage, done, skipped, quarantined, samples, dropped, per second.
    """
    ledger = Ledger(store)
    for job in jobs:
        if not ledger.committed(job.stage) and (other := made_otherwise(ledger, job.stage)):
            logger.warning("%s begins with its first shard: %s", job.stage.name, other)
    live = _Live(store, jobs, title, pictures)
    needs = resources(compute, own)
    if unasked(compute, own):
        logger.info("%s: on the cores of the cluster; gpus=1 gives each worker a GPU of it", title)
    reports = run_stages(
        store, jobs, target=compute.ray, resources=needs, on_progress=live.update
    )
    live.show()
    rows = [_row(name, report) for name, report in reports.items()]
    ui.table(f"{title}-stages", rows, f"Stages of {title}")
    for row in rows:
        logger.info("%s", ", ".join(f"{name} {value}" for name, value in row.items()))
    return rows


class _Live:
    """A progress bar, and now and then the status and results of the stages, while they run."""

    def __init__(
        self, store: Store, jobs: list[StageJob], title: str, pictures: Callable[[], None]
    ) -> None:
        self._store, self._title, self._pictures = store, title, pictures
        self._stages = [job.stage.id for job in jobs]
        self._follow = ui.follow(title)
        self._next = time.monotonic() + STATUS_SECONDS

    def update(self, now: RunProgress) -> None:
        """Take up the progress of the run."""
        self._follow(now)
        if time.monotonic() > self._next:
            self.show()

    def show(self) -> None:
        """Status of the run's stages, and new pictures; trouble with it never ends the run."""
        if not ui.in_run():
            return
        began = time.monotonic()
        try:
            rows = as_rows(status(self._store, self._stages))
            ui.table(f"{self._title}-status", rows, f"Status of {self._title}")
            self._pictures()
        except Exception:
            logger.warning("the status could not be shown; the run goes on", exc_info=True)
        # Reading many commits takes a while: at most a twentieth of the time is spent on it.
        spent = time.monotonic() - began
        self._next = time.monotonic() + max(STATUS_SECONDS, 20 * spent)


@contextmanager
def timed(store: Store, name: str) -> Iterator[None]:
    """Add the wall-clock time of the block to what the dataset has cost so far."""
    began = time.monotonic()
    try:
        yield
    finally:
        try:
            _spend(store, name, time.monotonic() - began)
        except (OSError, ValueError):  # what ends the block, such as a full disk, is told instead
            logger.warning("the time of %s could not be noted", name, exc_info=True)


def _spend(store: Store, name: str, seconds: float) -> None:
    while True:
        version = store.version(SECONDS)
        spent = store.read_json(SECONDS) if version else {}
        spent[name] = round(spent.get(name, 0.0) + seconds, 2)
        try:
            return store.replace(SECONDS, json_bytes(spent), version)
        except StoreConflict:  # another flow of this dataset has ended at the same time
            continue


def seconds_spent(store: Store) -> dict[str, float]:
    """Wall-clock seconds of each stage, over all runs of the flows."""
    return store.read_json(SECONDS) if store.exists(SECONDS) else {}


def _row(name: str, report: StageReport) -> dict[str, Any]:
    return {
        "stage": name,
        "shards done": report.done,
        "done before": report.skipped,
        "quarantined": len(report.quarantined),
        "failed": _failures(report),
        "samples": report.samples,
        "dropped": ", ".join(f"{reason} {n}" for reason, n in report.drops.most_common()) or "none",
        "samples per second": round(report.samples_per_second, 1),
        "seconds": round(report.seconds, 1),
        "waited for": percentages(report.waits),
    }


def _failures(report: StageReport) -> str:
    classes = Counter(map(failure_class, report.quarantined.values()))
    return ", ".join(f"{name} {number}" for name, number in classes.most_common()) or "none"


def hand_on(store: Store, flow: str, version: str | None) -> None:
    """Announce a complete step, so that automations start the next; see `infra.automations`.

    Only a run of a deployment that stands alone hands on: whoever types commands goes on by hand,
    and the end-to-end flow goes on by itself. Trouble is logged: the step itself is done.
    """
    from prefect.client.orchestration import get_client
    from prefect.runtime import deployment, flow_run

    from infra.automations import announce

    if version is None or not deployment.id or flow_run.parent_flow_run_id:
        return
    try:
        with get_client(sync_client=True) as client:
            announce(client, store, flow, version)
    except Exception:
        logger.exception("%s could not be announced; run it again to try once more", flow)
