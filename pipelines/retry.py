"""Flow: rows that failed for passing reasons are downloaded once more, as further shards."""

from __future__ import annotations

from typing import Any

from prefect import flow

from infra.store import Store
from pipelines.ingest import fetch_rows, find_repeated
from pipelines.params import RetryParams
from pipelines.stages import stage_task
from tasks.chain import Chain
from tasks.plans import plan_retry


@stage_task("plan retry")
def plan_pass(params: RetryParams) -> int:
    """Plan one more pass, unless the last one is not at its end; returns its rows."""
    store = Store(params.root)
    dataset = Chain(store)
    left = dataset.ledger.todo(dataset.download, dataset.shards)
    last = dataset.plan["passes"][-1] if dataset.plan["passes"] else {"list": {}}
    if left and "list" not in last and min(left) >= last["first_shard"]:
        return int(last["rows"])
    return int(plan_retry(store, dataset.download, params.reasons)["rows"])


@flow(
    name="retry",
    flow_run_name="{params.dataset}",
    description=RetryParams.__doc__,
)
def retry_flow(params: RetryParams) -> list[dict[str, Any]]:
    """Download once more the rows that failed for passing reasons, as further shards."""
    plan_pass(params)
    return fetch_rows(params) + find_repeated(params)
