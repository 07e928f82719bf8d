"""`fourm speedrun`: time to a fixed loss."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from infra.store import Store
from pipelines.params import SpeedrunParams
from tasks.recipes import recipe
from tasks.speedrun import check_recordable, record, speedrun

logger = logging.getLogger("fourm.speedrun")


def run(params: SpeedrunParams) -> Iterator[str]:
    """Lines of the outcome. Raises ValueError where it could not be recorded as asked."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fourm").setLevel(logging.INFO)
    if params.record:
        check_recordable()
    outcome = speedrun(Store(params.root), recipe("speedrun", seed=params.seed), on_progress=_tell)
    yield str(outcome)
    if params.record:
        yield record(params.board, outcome, note=params.note)


def _tell(step: int, steps: int, metrics: dict[str, float]) -> None:
    logger.info("step %d/%d, loss %.3f", step, steps, metrics.get("loss", float("nan")))
