"""Flow: an exported set, or one of the released 4M code, becomes a dataset."""

from __future__ import annotations

from typing import Any

from prefect import flow

from infra.store import Store
from pipelines.params import ImportParams
from pipelines.stages import run_jobs, stage_task
from pipelines.workers import NO_GPU
from tasks.interchange import finish_import, import_jobs


@stage_task("import")
def import_shards(params: ImportParams) -> list[dict[str, Any]]:
    """Rebuild the shards of the set, compare them with what was exported, and publish them."""
    store, source = Store(params.root), Store(params.source)
    rows = run_jobs(store, import_jobs(store, source), params, "import", own=NO_GPU)
    finish_import(store, source)
    return rows


@flow(
    name="import",
    flow_run_name="{params.dataset}",
    description=ImportParams.__doc__,
)
def import_flow(params: ImportParams) -> list[dict[str, Any]]:
    """Take over a set in the layout ml-4m, webdataset or parquet, to the same bytes."""
    return import_shards(params)
