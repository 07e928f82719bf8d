"""Status counts what the commits say, old fingerprints included."""

import json

import pytest

from infra import units
from infra.ledger import Ledger, Stage
from infra.runner import StageJob
from infra.status import as_json, status
from infra.store import Store
from tests.infra.runner_works import ROWS
from tests.infra.test_runner import run, toy_job


def test_status_counts_done_failed_dropped_and_left(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "RETRY_SECONDS", 0.0)
    store = Store(str(tmp_path))
    Ledger(store).write_plan({"num_shards": 5})
    job = toy_job(4, fail=[3])
    run(store, job)
    (line,) = status(store)
    assert line.stage == job.stage.id
    assert (line.done, line.total, line.quarantined) == (3, 5, 1)
    assert line.samples == 3 * ROWS
    assert line.drops == {"http_404": 3}
    assert line.rate > 0
    assert line.eta is not None
    assert line.eta > 0
    assert json.loads(as_json([line]))[0]["done"] == 3


def test_every_fingerprint_is_a_stage_of_its_own(tmp_path):
    store = Store(str(tmp_path))
    Ledger(store).write_plan({"num_shards": 1})
    for version in (1, 2):
        stage = Stage(name="label:toy", version=version, params={}, outputs=("toy",))
        run(store, StageJob(stage, "tests.infra.runner_works:build", {}, (0,)))
    lines = status(store)
    assert len({line.stage for line in lines}) == 2
    assert all((line.done, line.eta) == (1, 0.0) for line in lines)


def test_status_of_a_store_without_a_plan_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="plan"):
        status(Store(str(tmp_path)))
