"""Status counts what the commits say, old fingerprints included."""

import dataclasses

import pytest

from infra import units
from infra.ledger import Ledger, Stage, commit_path
from infra.runner import StageJob
from infra.status import as_rows, duration, failure_class, size, status
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
    assert (line.left, line.failed) == (1, {"ValueError": 1})
    (row,) = as_rows([line])
    assert (row["done"], row["left"], row["failed"]) == ("3/5", 1, "ValueError 1")
    assert row["dropped"] == "http_404 3"
    assert line.bytes == sum(map(store.size, store.list("shards/"))) > 0
    assert row["stored"] == size(line.bytes)


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


def rewritten(store, stage, shard, **changes):
    """A commit with other times, as if shards had been made then."""
    value = dataclasses.asdict(Ledger(store).read_commit(stage, shard)) | changes
    store.write_json(commit_path(stage.id, shard), value)


def test_pace_counts_neither_pauses_nor_parallel_work_twice(tmp_path):
    store = Store(str(tmp_path))
    Ledger(store).write_plan({"num_shards": 6})
    job = toy_job(4)
    run(store, job)
    # Two workers side by side for 100 s, a night's pause, then one worker for 200 s.
    made = [("10:01:40", 100.0), ("10:01:40", 100.0), ("22:01:40", 100.0), ("22:03:20", 100.0)]
    for shard, (time, seconds) in enumerate(made):
        created = f"2026-11-22T{time}+00:00"
        rewritten(store, job.stage, shard, created=created, seconds=seconds + shard)
    (line,) = status(store)
    elapsed = 101 + 102 + 101  # the last two overlap by a little: each began a little earlier
    assert line.rate == pytest.approx(4 * ROWS / elapsed, rel=0.02)
    assert line.eta == pytest.approx(elapsed / 4 * 2, rel=0.02)
    assert line.workers == pytest.approx(406 / elapsed, rel=0.02)
    assert line.slowest == (3, 103.0)


def test_waits_and_queues_are_means_over_the_commits_that_tell_of_them(tmp_path):
    store = Store(str(tmp_path))
    Ledger(store).write_plan({"num_shards": 4})
    job = toy_job(4)
    run(store, job)
    rewritten(store, job.stage, 0, seconds=30.0, waited={"input": 3.0}, queues={"requests": 8.0})
    rewritten(store, job.stage, 1, seconds=10.0, waited={"input": 7.0, "output": 1.0},
              queues={"requests": 4.0, "mb_to_clean": 0.4})  # fmt: skip
    old = store.read_json(commit_path(job.stage.id, 2))
    store.write_json(commit_path(job.stage.id, 2), {
        name: value for name, value in old.items() if name not in ("waited", "queues")
    })
    assert Ledger(store).read_commit(job.stage, 2).waited == {}
    (line,) = status(store)
    assert line.done == 4
    assert line.waited == pytest.approx({"input": 0.25, "output": 0.025})
    assert line.queues == pytest.approx({"requests": 7.0, "mb_to_clean": 0.1})
    (row,) = as_rows([line])
    assert row["waited for"] == "input 25 %, output 2 %"
    assert row["at work"] == "requests 7, mb to clean 0.1"


def test_shards_that_overlap_in_a_worker_share_its_time(tmp_path):
    store = Store(str(tmp_path))
    Ledger(store).write_plan({"num_shards": 4})
    job = toy_job(4)
    run(store, job)
    for shard in range(4):
        rewritten(store, job.stage, shard, created="2026-11-22T10:01:40+00:00", seconds=100.0,
                  queues={"shards": 2.0})  # fmt: skip
    (line,) = status(store)
    assert (line.seconds, line.workers) == (200.0, 2.0)
    assert line.rate == pytest.approx(4 * ROWS / 100)


def test_what_was_begun_and_has_not_ended_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "RETRY_SECONDS", 0.0)
    store = Store(str(tmp_path))
    ledger = Ledger(store)
    ledger.write_plan({"num_shards": 9})
    job = toy_job(4, fail=[3])
    run(store, job)
    for shard in (6, 6, 7):  # as workers leave it that are at them, one for the second time
        ledger.attempt(job.stage, shard)
    begun = ledger.begun(job.stage)
    assert (begun[0], begun[6], begun[7], begun[8]) == (1, 2, 1, 0)
    (line,) = status(store)
    assert (line.done, line.quarantined, line.left, line.begun) == (3, 1, 5, 2)
    assert as_rows([line])[0]["begun"] == 2


def test_only_the_stages_that_are_asked_for_are_read(tmp_path):
    store = Store(str(tmp_path))
    Ledger(store).write_plan({"num_shards": 2})
    first, second = toy_job(2, "label:a"), toy_job(2, "label:b")
    run(store, first, second)
    assert [line.stage for line in status(store, [second.stage.id])] == [second.stage.id]
    (untouched,) = status(store, ["label:c@00000000"])
    assert (untouched.done, untouched.left, untouched.eta, untouched.slowest) == (0, 2, None, None)
    assert as_rows([untouched])[0]["time left"] == "?"


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        ("3 attempts failed: ValueError: shard 1 is broken", "ValueError"),
        ("3 attempts failed: the worker died each time it ran this shard", "worker died"),
        ("by hand", "by hand"),
        ("", "unknown"),
    ],
)
def test_failures_have_classes(reason, name):
    assert failure_class(reason) == name


def test_durations_read_as_clocks():
    assert [duration(s) for s in (None, 0, 59.6, 3725)] == ["?", "0:00", "1:00", "1:02:05"]
