"""Serves the flow that the cancel test runs: python cancel_flow.py <store url>."""

import sys
from typing import Any

from prefect import flow

from infra.ray_session import Embedded
from infra.runner import Resources, run_stages
from infra.store import Store
from infra.ui import follow
from tests.infra.test_runner_cancel import toy_job


def note_hook(flow: Any, flow_run: Any, state: Any) -> None:
    """Leaves a trace of the hook in the store."""
    Store(flow_run.parameters["url"]).write("hook", state.name.encode())


@flow(on_cancellation=[note_hook])
def labelling(url: str) -> None:
    """A quick stage and one that takes minutes."""
    jobs = [toy_job(2, "label:quick"), toy_job(8, "label:slow", seconds=60)]
    run_stages(
        Store(url),
        jobs,
        target=Embedded(num_cpus=2),
        resources=Resources(workers=2),
        on_progress=follow("labelling"),
    )


if __name__ == "__main__":
    labelling.serve("cancel", parameters={"url": sys.argv[1]})
