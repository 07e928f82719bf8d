"""The janitor's flow: dry unless told otherwise, and jobs end only after their runs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from uuid import UUID

import pytest
from prefect.exceptions import ObjectNotFound

from infra.ledger import Ledger
from infra.store import Store
from pipelines import janitor
from pipelines.params import JanitorParams
from tests.tasks.test_janitor import aged

ORPHAN = "shards/x@1/shard-000000.a.tar"


@pytest.fixture
def store(tmp_path) -> Store:
    made = Store(str(tmp_path))
    Ledger(made).write_plan({"num_shards": 1})
    made.write(ORPHAN, b"x")
    aged(made, ORPHAN, 24 * 8)
    return made


def test_nothing_is_removed_unless_asked_for(store):
    rows = [{"kind": "orphan", "number": 1, "bytes": 1}]
    assert janitor.sweep.fn(JanitorParams(root=store.url)) == rows
    assert store.exists(ORPHAN)
    assert janitor.sweep.fn(JanitorParams(root=store.url, apply=True)) == rows
    assert not store.exists(ORPHAN)
    assert janitor.sweep.fn(JanitorParams(root=store.url, apply=True)) == []


def test_a_root_without_a_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no dataset"):
        janitor.sweep.fn(JanitorParams(root=str(tmp_path / "typo"), apply=True))


@pytest.mark.parametrize(
    ("final", "hours", "ended"),
    [(False, 9, False), (True, 0.5, False), (True, 2, True), (None, 9, False)],
)
def test_a_job_ends_only_after_its_run_has_for_a_while(monkeypatch, final, hours, ended):
    """None: a run that this server does not know; another one's, or a command's own, may."""
    stopped = []

    class Api:
        def __init__(self, target: object) -> None: ...

        def running(self) -> dict[str, str]:
            return {"fourm-label-1-0": str(UUID(int=7))}

        def stop(self, job_id: str) -> None:
            stopped.append(job_id)

    state = SimpleNamespace(
        is_final=lambda: final, timestamp=datetime.now(UTC) - timedelta(hours=hours)
    )

    class Client:
        def __enter__(self) -> Client:
            return self

        def __exit__(self, *error: object) -> None: ...

        def read_flow_run(self, run_id: UUID) -> SimpleNamespace:
            if final is None:
                raise ObjectNotFound(http_exc=None)
            return SimpleNamespace(state=state)

    monkeypatch.setattr(janitor, "JobsApi", Api)
    monkeypatch.setattr("prefect.client.orchestration.get_client", lambda **_: Client())
    params = JanitorParams(dashboard="http://127.0.0.1:1", apply=True)
    assert bool(janitor.end_jobs.fn(params)) == ended
    assert bool(stopped) == ended
