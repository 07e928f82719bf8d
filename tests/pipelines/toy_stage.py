"""A stage for the tests of jobs; the job imports this module by name."""

from __future__ import annotations

import os
import time
from typing import Any

from infra import ui
from infra.ray_session import Embedded
from infra.runner import Resources, SystemicFailure, run_stages
from infra.store import Store
from pipelines.params import TokenizeParams
from pipelines.stages import stage_task
from tasks.run_store import TakenOver
from tests.infra.test_runner import toy_job


@stage_task("toy", counted=False)
def toy(params: TokenizeParams) -> list[dict[str, Any]]:
    """Commits two shards and shows a table; `crops` says how it misbehaves."""
    if params.crops == 9:
        raise ValueError("nine crops are too many")
    if params.crops == 10:
        raise OSError("a hiccup")
    if params.crops == 11:
        raise SystemicFailure("no disk")
    if params.crops == 13:
        raise TakenOver("another trains it")
    store, bar = Store(params.root), ui.progress("toy")
    if params.crops == 12:
        store.write("started", str(os.getpid()).encode())
        time.sleep(600)
    resources = Resources(workers=params.workers or 0)
    reports = run_stages(
        store,
        [toy_job(2)],
        target=Embedded() if resources.workers == 0 else params.ray,
        resources=resources,
        on_progress=lambda now: bar.update(now.done, now.total, now.text),
    )
    rows = [{"stage": name, "done": report.done} for name, report in reports.items()]
    ui.table("toy", rows, "Toy")
    return rows


def not_a_stage(params: TokenizeParams) -> None:
    """The store must not be able to name this."""
