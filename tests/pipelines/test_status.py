"""`fourm status` shows a line for each stage, with everything a person asks of it."""

import errno
import io

import pytest
from rich.console import Console

from infra import units
from infra.ledger import Ledger
from infra.runner import SystemicFailure
from infra.store import Store
from pipelines import stages
from pipelines.stages import timed
from pipelines.status import tables
from tests.infra.test_runner import run, toy_job


def test_a_stage_shows_done_left_failed_pace_workers_and_slowest(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "RETRY_SECONDS", 0.0)
    store = Store(str(tmp_path))
    Ledger(store).write_plan({"num_shards": 9})
    job = toy_job(4, fail=[3], waited={"input": 0.02}, queues={"requests": 7.0})
    run(store, job)
    store.write("runs/first/curve.jsonl", b'{"step": 7, "loss": 1.5, "samples_per_second": 2.0}\n'
                                          b'{"step": 7, "val/rgb->depth": 2.5}\n')
    console = Console(width=130, file=io.StringIO())
    console.print(tables(store))
    text = console.file.getvalue()
    heads = "".join(line for line in text.splitlines() if "stage" in line)
    for name in ("done", "left", "begun", "samples/s", "workers", "time left", "slowest", "failed",
                 "dropped", "waited for", "at work"):
        assert name in heads
    pace, lost = (line for line in text.splitlines() if job.stage.id in line)
    for value in ("3/9", " 5 ", "0: 0:00"):
        assert value in pace
    for value in ("ValueError 1", "http_404 3", "input 20 %", "requests 7"):
        assert value in lost
    (curve,) = [line for line in text.splitlines() if "runs/first" in line]
    assert "step 7" in curve
    assert "loss 1.500" in curve


def test_flows_that_end_together_both_count_what_they_took(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    read, others = store.read_json, iter([0.5, 0.25])

    def meanwhile(path: str) -> dict[str, float]:
        value = read(path)
        if (seconds := next(others, None)) is not None:
            stages._spend(Store(store.url), "label", seconds)
        return value

    stages._spend(store, "fetch", 2.0)
    monkeypatch.setattr(store, "read_json", meanwhile)
    stages._spend(store, "publish", 1.0)
    monkeypatch.undo()
    assert stages.seconds_spent(store) == {"fetch": 2.0, "label": 0.75, "publish": 1.0}


def test_a_stage_ends_as_it_ended_although_its_time_cannot_be_noted(tmp_path, caplog):
    class Full(Store):
        def replace(self, path: str, data: bytes, expected: str | None) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    store = Full(str(tmp_path))
    with pytest.raises(SystemicFailure, match="the network is down"), timed(store, "label"):
        raise SystemicFailure("the network is down")
    with timed(store, "label"):
        pass
    assert caplog.text.count("the time of label could not be noted") == 2
