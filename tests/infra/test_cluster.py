"""A node that is taken away in the middle of a run costs no commit, with room for its worker
elsewhere or without."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.ledger import Ledger
from infra.ray_session import Embedded, Existing, ray_session
from infra.runner import Resources, RunProgress, run_stages
from infra.store import Store
from infra.verify import verify
from tests.infra.ray_cluster import head, node
from tests.infra.serving import descendants, end, until
from tests.infra.test_runner import hashes, toy_job


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.parametrize("room", [2, 1])
def test_a_node_that_is_removed_in_mid_run_costs_no_commit(tmp_path: Path, room: int) -> None:
    import ray

    store, undisturbed = Store(str(tmp_path / "store")), Store(str(tmp_path / "undisturbed"))
    job = toy_job(24, seconds=0.5)
    run_stages(undisturbed, [toy_job(24)], target=Embedded(), resources=Resources(workers=0))
    with head(cpus=room) as (address, _), node(address) as second:
        with ray_session(Existing(address=address)):
            until(lambda: ray.cluster_resources().get("CPU") == room + 1, 300, "the second node")

            def remove(now: RunProgress) -> None:
                if now.done == 4:
                    end([*descendants(second), second])

            report = run_stages(
                store, [job], target=Existing(address=address),
                resources=Resources(workers=2), on_progress=remove,
            )[job.stage.id]
            assert ray.cluster_resources()["CPU"] == room
    assert (report.done, report.failed) == (24, 0)
    assert hashes(store, job) == hashes(undisturbed, job)
    assert Ledger(store).quarantined(job.stage) == {}
    assert verify(store, deep=True).ok
