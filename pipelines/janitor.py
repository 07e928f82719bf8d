"""Flow: what nobody needs any more is listed, and removed where that is asked for."""

from __future__ import annotations

import logging
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect import flow

from infra import ui
from infra.ray_jobs import JobsApi
from infra.ray_session import Job
from infra.store import Store
from pipelines.params import JanitorParams
from pipelines.stages import stage_task
from tasks.janitor import Litter, find_litter, remove

logger = logging.getLogger("fourm.janitor")

GRACE = timedelta(hours=1)
"""How long a job is left alone after its flow run has ended: a new run may go on with it."""


@stage_task("sweep", counted=False)
def sweep(params: JanitorParams) -> list[dict[str, Any]]:
    """Find litter, show it by kind, and remove it if that is asked for."""
    store = Store(params.root)
    if not store.exists("plan/plan.json"):
        raise ValueError(f"there is no dataset at {params.root}")
    litter = find_litter(store, params.older_than_days * 86_400)
    removed = remove(store, litter) if params.apply else 0
    rows = _by_kind(litter)
    ui.table("litter", rows, "Removed" if params.apply else "Would be removed")
    for item in litter[:20]:
        logger.info("%s %s", item.kind, item.path)
    total = sum(item.bytes for item in litter)
    done = f"{removed} removed" if params.apply else "nothing removed; `apply` does it"
    logger.info("%d things, %.1f MB; %s", len(litter), total / 1e6, done)
    return rows


def _by_kind(litter: list[Litter]) -> list[dict[str, Any]]:
    kinds: dict[str, list[Litter]] = defaultdict(list)
    for item in litter:
        kinds[item.kind].append(item)
    return [
        {"kind": kind, "number": len(items), "bytes": sum(item.bytes for item in items)}
        for kind, items in sorted(kinds.items())
    ]


@stage_task("end jobs", counted=False)
def end_jobs(params: JanitorParams) -> list[str]:
    """Stop the jobs of a Ray cluster whose flow run ended long ago: nobody follows them."""
    api = JobsApi(Job(address=params.dashboard))
    over = [job_id for job_id, owner in api.running().items() if _has_ended(owner)]
    for job_id in over:
        logger.warning("job %s has lost its flow run", job_id)
        if params.apply:
            api.stop(job_id)
    return over


def _has_ended(run_id: str) -> bool:
    """Whether this server knows that the run is over, and for long enough."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(UUID(run_id)).state
        except ObjectNotFound:
            # Of another server, or of a command's own, on a cluster that both use.
            return False
    return state is not None and state.is_final() and datetime.now(UTC) - state.timestamp > GRACE


@flow(
    name="janitor",
    flow_run_name="{params.dataset}",
    description=JanitorParams.__doc__,
)
def janitor_flow(params: JanitorParams) -> list[dict[str, Any]]:
    """Remove what no commit and no manifest names: orphans, old attempts and checkpoints."""
    if params.dashboard:
        end_jobs(params)
    return sweep(params)
