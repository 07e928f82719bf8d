"""Flow: the rows of a list, a folder or tars become shards of pictures and captions."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from prefect import flow

from infra import ui
from infra.ledger import OK
from infra.sources import Source
from infra.store import Store
from pipelines.params import IngestOptions, IngestParams, RetryParams
from pipelines.stages import run_jobs, stage_task
from pipelines.workers import NO_GPU
from tasks import chain, duplicates, fetch
from tasks.checks import check
from tasks.growth import append_list

logger = logging.getLogger("fourm.flows")


@stage_task("plan")
def plan_rows(params: IngestParams) -> int:
    """Cut the list into shards of rows, once and for all; returns their number."""
    store = Store(params.root)
    source = Source(
        path=params.source,
        format=params.format,
        url=params.url_column,
        caption=params.caption_column,
        extra=tuple(params.extra_columns),
    )
    if params.append and store.exists("plan/plan.json"):
        rows = append_list(store, source, limit=params.limit)
        logger.info("rows of %s that are new: %d", params.source, rows)
    else:
        fetch.make_plan(store, source, shard_rows=params.shard_rows, limit=params.limit)
    choices = params.model_dump(include=set(IngestOptions.model_fields))
    chain.remember(store, "ingest", choices)
    return len(chain.Chain(store).shards)


@stage_task("fetch")
def fetch_rows(params: IngestParams | RetryParams) -> list[dict[str, Any]]:
    """Download and clean every planned row."""
    store = Store(params.root)
    dataset = chain.Chain(store)
    _check(dataset, params)
    job = fetch.fetch_job(dataset.plan, dataset.fetch_config)
    rows = run_jobs(store, [job], params, "fetch", own=NO_GPU)
    fates: Counter[str] = Counter()
    for commit in dataset.ledger.each_commit(dataset.download):
        fates.update({OK: commit.samples, **commit.drops})
    table = [{"fate": fate, "rows": number} for fate, number in fates.most_common()]
    ui.table("fetch-fates", table, "What became of the rows")
    if not fates[OK]:
        lost = ", ".join(f"{fate} {number}" for fate, number in fates.most_common() if number)
        hint = "; private hosts are asked where --allow-hosts names them"
        logger.warning("no row led to a picture: %s%s", lost,
                       hint if fates["blocked_address"] else "")
    return rows


@stage_task("duplicates")
def find_repeated(params: IngestParams | RetryParams) -> list[dict[str, Any]]:
    """Mark pictures that repeat earlier ones, and leave them out where that was chosen."""
    store = Store(params.root)
    dataset = chain.Chain(store)
    _check(dataset, params)
    marks, table = duplicates.mark_duplicates(store, dataset.download)
    kinds = table.column("kind").value_counts().to_pylist()
    lines = [{"kind": kind["values"], "pictures": kind["counts"]} for kind in kinds]
    ui.table("duplicates", lines, f"Pictures that repeat others, by key in {marks}")
    drop = dataset.duplicates
    if drop == "mark":
        return []
    job = duplicates.distinct_job(store, dataset.download, drop, marks)
    return run_jobs(store, [job], params, "distinct", own=NO_GPU)


def _check(dataset: chain.Chain, params: IngestParams | RetryParams) -> None:
    """A retry goes by whatever was chosen last."""
    if isinstance(params, IngestParams):
        dataset.check("ingest", params.model_dump(include=set(IngestOptions.model_fields)))


@flow(
    name="ingest",
    flow_run_name="{params.dataset}",
    description=IngestParams.__doc__,
)
def ingest_flow(params: IngestParams) -> list[dict[str, Any]]:
    """Download the pictures of a list into shards, with a fate for every row."""
    check("ingest", params.model_dump())
    plan_rows(params)
    return fetch_rows(params) + find_repeated(params)
