"""The janitor removes litter that is old, and never what a commit or a manifest names."""

from __future__ import annotations

import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.ledger import Ledger, ShardData, Stage
from infra.manifest import publish
from infra.shards import sample_key, write_tar
from infra.store import Store
from infra.verify import verify
from tasks.janitor import LEAST_AGE, find_litter, remove

STAGE = Stage("fetch", 1, {}, ("rgb",))
HOUR = 3600.0
AGE = 24 * HOUR


def commit(ledger: Ledger, shard: int) -> None:
    keys = [sample_key(shard, row) for row in range(2)]
    tar = write_tar((f"{key}.jpg", b"pixels") for key in keys)
    ledger.commit(STAGE, shard, ShardData(keys, {"rgb": tar}, [(k, "ok", "") for k in keys], 1.0))


def aged(store: Store, path: str, hours: float) -> None:
    """Make an object of a folder look as if written so long ago."""
    when = time.time() - hours * HOUR
    os.utime(Path(store.url.removeprefix("file://")) / path, (when, when))


def paths(store: Store, **options: Any) -> set[str]:
    return {item.path for item in find_litter(store, AGE, **options)}


ages = st.sampled_from([0.0, 5.0, 23.0, 25.0, 1000.0])
_objects = st.dictionaries(
    st.sampled_from(
        [
            f"shards/fetch:rgb@{STAGE.fingerprint[:8]}/shard-000001.0123456789ab.tar",
            f"shards/fetch:rgb@{STAGE.fingerprint[:8]}/shard-000007.0123456789ab.tar",
            f"status/{STAGE.id}/shard-000002.0123456789ab.parquet",
            "shards/label:depth@00000000/shard-000000.0123456789ab.tar",
            f"attempts/{STAGE.id}/shard-000000.1",
            f"attempts/{STAGE.id}/shard-000003.1",
            f"quarantine/{STAGE.id}/shard-000003.json",
            "runs/a/checkpoints/step-00000001/state.json",
            "runs/a/checkpoints/step-00000002/state.json",
            "runs/a/checkpoints/step-00000003/state.json",
            "runs/a/checkpoints/step-00000004/model.safetensors",
            "runs/b/checkpoints/step-00000001/state.json",
            "runs/b/run.json",
            "jobs/fourm-x-0/result.json",
            "tokenizers/text/info.json",
        ]
    ),
    ages,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.integers(0, 2), ages), st.sets(st.integers(0, 2)), _objects)
def test_whatever_lies_there_only_old_litter_goes(committed, published, objects):
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        ledger = Ledger(store)
        for path, hours in objects.items():
            store.write(path, b'{"reason": "x"}')
            aged(store, path, hours)
        for shard, hours in committed.items():
            before = set(store.list())
            commit(ledger, shard)
            for path in set(store.list()) - before:
                aged(store, path, hours)
        if shards := published & committed.keys():
            publish(ledger, "main", {"rgb": STAGE}, shards)
        todo, everything = ledger.todo(STAGE, range(8)), set(store.list())
        litter = find_litter(store, AGE)
        assert set(store.list()) == everything, "looking removes nothing"
        assert remove(store, litter) == len(litter)
        gone = everything - set(store.list())
        assert gone == {item.path for item in litter}
        assert verify(store, deep=True).ok
        assert ledger.todo(STAGE, range(8)) == todo
        assert all(objects.get(path, 0.0) >= 24 for path in gone), "young objects stay"
        assert not gone & {"runs/a/checkpoints/step-00000003/state.json", "runs/b/run.json"}
        assert not any(path.startswith(("quarantine/", "tokenizers/", "commits/")) for path in gone)
        orphans = {path for path in objects if path.startswith(("shards", "status"))}
        orphans = {path for path in orphans if objects[path] > 24}
        assert orphans <= gone, "every old orphan goes"
        assert find_litter(store, AGE) == []


def test_an_object_that_is_named_meanwhile_stays(tmp_path):
    store = Store(str(tmp_path))
    ledger = Ledger(store)
    commit(ledger, 0)
    (path,) = store.list("commits/")
    record = store.read(path)
    store.delete(path)
    for name in store.list("sh") + store.list("status"):
        aged(store, name, 100)
    litter = find_litter(store, AGE)
    assert len(litter) == 2
    store.write(path, record)
    assert remove(store, litter) == 0
    assert verify(store, deep=True).ok


def test_an_object_that_is_written_anew_meanwhile_stays(tmp_path):
    store = Store(str(tmp_path))
    store.write("shards/x@1/shard-000000.a.tar", b"x")
    aged(store, "shards/x@1/shard-000000.a.tar", 100)
    litter = find_litter(store, AGE)
    store.write("shards/x@1/shard-000000.a.tar", b"x")
    assert remove(store, litter) == 0


def test_an_orphan_that_a_run_makes_again_during_the_removal_stays(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    orphans = [f"shards/x@1/shard-{number:06d}.a.tar" for number in range(2)]
    for path in orphans:
        store.write(path, b"x")
        aged(store, path, 100)
    litter, delete = find_litter(store, AGE), store.delete

    def meanwhile(path: str) -> None:
        delete(path)
        store.write(orphans[1], b"x")

    monkeypatch.setattr(store, "delete", meanwhile)
    assert remove(store, litter) == 1
    assert store.list("shards/") == orphans[1:]


@pytest.mark.parametrize("broken", ["commits/x@1/shard-000000.json", "manifests/main/v0001.json"])
def test_no_orphan_goes_while_a_record_cannot_be_read(tmp_path, broken, caplog):
    store = Store(str(tmp_path))
    store.write("shards/x@1/shard-000000.a.tar", b"x")
    aged(store, "shards/x@1/shard-000000.a.tar", 100)
    store.write(broken, b"{")
    assert paths(store) == set()
    assert "orphans are kept" in caplog.text


def test_checkpoints_go_with_the_run_they_serve(tmp_path):
    store = Store(str(tmp_path))
    for step in (1, 2, 3):
        for name in ("model.safetensors", "state.json"):
            store.write(f"runs/a/checkpoints/step-{step:08d}/{name}", b"x")
            aged(store, f"runs/a/checkpoints/step-{step:08d}/{name}", 100)
    store.write("runs/a/checkpoints/step-00000004/model.safetensors", b"x")
    folder = "runs/a/checkpoints/step-0000000"
    assert paths(store) == {f"{folder}1/model.safetensors", f"{folder}1/state.json"}
    aged(store, f"{folder}4/model.safetensors", 100)
    assert f"{folder}4/model.safetensors" in paths(store), "never completed"
    store.write("runs/a/run.json", b"{}")
    assert len(paths(store)) == 7, "a finished run resumes no more"


def test_a_job_that_is_still_written_to_is_kept_whole(tmp_path):
    store = Store(str(tmp_path))
    for name in ("call.json", "shown/progress-label.json"):
        store.write(f"jobs/fourm-label-1-0/{name}", b"{}")
    aged(store, "jobs/fourm-label-1-0/call.json", 100)
    assert paths(store) == set()
    aged(store, "jobs/fourm-label-1-0/shown/progress-label.json", 100)
    assert len(paths(store)) == 2


def test_unfinished_writes_of_a_folder_go(tmp_path):
    store = Store(str(tmp_path))
    store.write("x", b"x")
    store.write(".fourm/0123456789abcdef", b"half")
    store.write(".fourm/a.lock", b"")
    for name in ("0123456789abcdef", "a.lock"):
        aged(store, f".fourm/{name}", 100)
    litter = find_litter(store, AGE)
    assert [item.kind for item in litter] == ["write"]
    assert remove(store, litter) == 1
    assert not store.exists(".fourm/0123456789abcdef")


def test_unfinished_uploads_of_a_bucket_go_and_orphans_with_them(s3_url):
    store = Store(f"{s3_url}/janitor")
    commit(Ledger(store), 0)
    store.write("shards/x@1/shard-000000.a.tar", b"x")
    bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
    fs = store._backend.fs
    fs.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{prefix}/shards/y.tar")
    fs.call_s3("create_multipart_upload", Bucket=bucket, Key="of-somebody-else/y.tar")
    # moto says of every upload that it began in 2010; the orphan is young.
    assert [item.kind for item in find_litter(store, AGE)] == ["write"]
    litter = find_litter(store, AGE, now=time.time() + 2 * AGE)
    assert sorted(item.kind for item in litter) == ["orphan", "write"]
    assert remove(store, litter) == 2
    assert len(fs.call_s3("list_multipart_uploads", Bucket=bucket)["Uploads"]) == 1
    assert verify(store, deep=True).ok


def test_an_age_that_endangers_work_under_way_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 3600 s"):
        find_litter(Store(str(tmp_path)), LEAST_AGE - 1)


def test_uploads_of_many_pages_are_all_found():
    from infra.backends import S3Backend

    began = datetime(2026, 11, 22, tzinfo=UTC)
    pages = {
        None: {"Uploads": [_upload("in/a", began)], "IsTruncated": True,
               "NextKeyMarker": "in/a", "NextUploadIdMarker": "1"},
        "in/a": {"Uploads": [_upload("in/b", began), _upload("inside-another/c", began)]},
    }  # fmt: skip

    class Pages:
        def call_s3(self, call: str, **arguments: str) -> dict[str, Any]:
            assert (call, arguments["Bucket"], arguments["Prefix"]) == (
                "list_multipart_uploads", "bucket", "in"
            )  # fmt: skip
            return pages[arguments.get("KeyMarker")]

    backend = S3Backend("bucket/in", {})
    backend.__dict__["fs"] = Pages()
    stamp = began.timestamp()
    assert backend.unfinished() == {"1 in/a": stamp, "1 in/b": stamp}


def _upload(key: str, began: datetime) -> dict[str, Any]:
    return {"Key": key, "UploadId": "1", "Initiated": began}


@pytest.mark.parametrize("ahead", [100 * 24 * HOUR, -100 * 24 * HOUR])
def test_ages_are_told_by_the_clock_of_the_store_and_not_of_this_host(
    tmp_store, monkeypatch, ahead
):
    tmp_store.write("shards/x@1/shard-000000.a.tar", b"about to be committed")
    here = time.time
    monkeypatch.setattr(time, "time", lambda: here() + ahead)
    assert find_litter(tmp_store, AGE) == []
    later = tmp_store.now() + AGE + HOUR
    assert [item.kind for item in find_litter(tmp_store, AGE, now=later)] == ["orphan"]
    assert tmp_store.unfinished() == {}
