"""Contracts of the ledger: one commit a shard, nothing half published, resuming is subtraction."""

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from infra.blocks import BlockWriter, Column
from infra.ledger import Commit, Ledger, ShardData, Stage
from infra.shards import TarIndex, TornShard, hole, key_digest, sample_key, write_tar
from infra.status import status
from infra.store import Store
from infra.verify import verify

FETCH = Stage("fetch", 1, {"size": 128}, ("rgb", "caption"))
DEPTH = Stage("label:depth", 1, {"bits": 16}, ("depth",), (FETCH,), "org/depth", "abc")


def fetched(shard: int, rows: int = 4, payload: bytes = b"x") -> ShardData:
    """A fetched shard whose last row is a dead link."""
    keys = [sample_key(shard, row) for row in range(rows)]
    outputs = {
        modality: write_tar((f"{key}.{ext}", payload + key.encode()) for key in keys[:-1])
        for modality, ext in (("rgb", "jpg"), ("caption", "txt"))
    }
    statuses = [(key, "ok", "") for key in keys[:-1]] + [(keys[-1], "404", "gone")]
    return ShardData(keys[:-1], outputs, statuses, seconds=0.5, info={"note": 1})


def test_a_commit_says_all_that_happened(
    tmp_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOURM_RUN_ID", "run-7")
    ledger, data = Ledger(tmp_store), fetched(3)
    fetch = ledger.commit(FETCH, 3, data)
    assert (fetch.samples, fetch.drops, fetch.run_id) == (3, {"404": 1}, "run-7")
    assert fetch.key_digest == key_digest(data.keys)
    assert fetch.samples_per_second == 6.0
    output = fetch.outputs["rgb"]
    assert output["sha256"] == hashlib.sha256(data.outputs["rgb"]).hexdigest()
    assert output["path"] == (
        f"shards/fetch:rgb@{FETCH.fingerprint[:8]}/shard-000003.{output['sha256'][:12]}.tar"
    )
    assert tmp_store.read(output["path"]) == data.outputs["rgb"]

    keys = data.keys
    tar = write_tar([(f"{keys[0]}.png", b"1"), hole(keys[1], "too dark"), (f"{keys[2]}.png", b"")])
    statuses = [(keys[0], "ok", ""), (keys[1], "too dark", ""), (keys[2], "ok", "")]
    label = ShardData(keys, {"depth": tar}, statuses, 1.0)
    depth = ledger.commit(DEPTH, 3, label, upstream_commits=[fetch])
    assert (depth.samples, depth.drops) == (3, {"too dark": 1})
    assert (depth.model, depth.revision) == ("org/depth", "abc")
    assert depth.upstream[f"{FETCH.id}/3"]["rgb"] == output["sha256"]
    assert ledger.commits(DEPTH) == ledger.commits(DEPTH.id) == {3: depth}
    assert ledger.stage_ids() == sorted([FETCH.id, DEPTH.id])
    path, sha256 = ledger.open_output(DEPTH, 3, "depth")
    assert TarIndex(path, sha256=sha256).keys == keys


def test_the_first_of_many_writers_wins(tmp_store: Store) -> None:
    ledger = Ledger(tmp_store)
    with ThreadPoolExecutor(6) as pool:
        commits = list(
            pool.map(lambda n: ledger.commit(FETCH, 0, fetched(0, payload=b"%d" % n)), range(6))
        )
    assert all(commit == commits[0] for commit in commits)
    assert ledger.commits(FETCH) == {0: commits[0]}
    assert ledger.statuses(FETCH).num_rows == 4


def test_work_done_again_gives_the_same_objects(tmp_path: Path) -> None:
    once, again = Ledger(Store(str(tmp_path / "a"))), Ledger(Store(str(tmp_path / "b")))
    for ledger in (once, again, again):
        ledger.commit(FETCH, 1, fetched(1))
    assert once.store.sizes("shards/") == again.store.sizes("shards/")
    assert once.store.sizes("status/") == again.store.sizes("status/")


def _broken() -> dict[str, tuple[ShardData, str]]:
    good, key = fetched(0), sample_key(0, 0)
    swapped = write_tar((f"{k}.jpg", b"") for k in reversed(good.keys))
    short = write_tar((f"{k}.jpg", b"") for k in good.keys[:-1])
    tokens = BlockWriter({"crop0": Column("uint16", 1)}, {})
    tokens.add("other", {"crop0": [1]})
    return {
        "order": (
            replace(good, outputs=good.outputs | {"rgb": swapped}),
            f"sample 0 is {good.keys[-1]} here and {key} there",
        ),
        "short": (replace(good, outputs=good.outputs | {"rgb": short}), "2 samples here"),
        "torn": (replace(good, outputs=good.outputs | {"rgb": short[:-512]}), "truncated"),
        "tokens": (replace(good, outputs=good.outputs | {"rgb": tokens.finish()}), "other"),
        "modality": (replace(good, outputs={"rgb": short}), "outputs"),
        "no status": (replace(good, statuses=good.statuses[1:]), "no status"),
        "ok, no output": (replace(good, keys=good.keys[:-1]), "ok but has no output"),
        "twice": (replace(good, statuses=[*good.statuses, (key, "ok", "")]), "twice"),
    }


@pytest.mark.parametrize("case", list(_broken()))
def test_a_shard_that_does_not_agree_with_itself_is_not_published(
    tmp_path: Path, case: str
) -> None:
    data, message = _broken()[case]
    store = Store(str(tmp_path))
    with pytest.raises((ValueError, TornShard), match=message):
        Ledger(store).commit(FETCH, 0, data)
    assert store.list() == []


def test_token_shards_commit_by_the_keys_inside_their_blocks(tmp_path: Path) -> None:
    stage = Stage("tokens:depth", 1, {}, ("tok_depth",), (DEPTH,))
    writer = BlockWriter({"crop0": Column("uint16", 2)}, {}, block_size=2)
    keys = [sample_key(0, row) for row in range(5)]
    for key in keys:
        writer.add(key, {"crop0": [1, 2]})
    data = ShardData(keys, {"tok_depth": writer.finish()}, [(k, "ok", "") for k in keys], 1)
    assert Ledger(Store(str(tmp_path))).commit(stage, 0, data).samples == 5


def test_an_empty_shard_is_a_shard(tmp_path: Path) -> None:
    ledger = Ledger(Store(str(tmp_path)))
    empty = write_tar([])
    commit = ledger.commit(FETCH, 0, ShardData([], {"rgb": empty, "caption": empty}, [], 0.0))
    assert (commit.samples, ledger.statuses(FETCH).num_rows) == (0, 0)


def test_fingerprints_follow_everything_that_changes_the_output() -> None:
    same = Stage.from_dict(DEPTH.to_dict())
    assert (same, same.id) == (DEPTH, DEPTH.id)
    changes = [
        replace(DEPTH, version=2),
        replace(DEPTH, params={"bits": 8}),
        replace(DEPTH, revision="abd"),
        replace(DEPTH, model="org/other"),
        replace(DEPTH, upstream=(replace(FETCH, version=2),)),
    ]
    assert len({stage.id for stage in [DEPTH, *changes]}) == 6
    left = replace(DEPTH, params={"a": 1, "b": {"c": 2, "d": 3}})
    right = replace(DEPTH, params={"b": {"d": 3, "c": 2}, "a": 1})
    assert left.fingerprint == right.fingerprint
    with pytest.raises(ValueError, match="names without"):
        Stage("a/b", 1, {}, ("x",))


def test_fingerprints_are_equal_in_another_process() -> None:
    program = (
        "from infra.ledger import Stage; f = Stage('fetch', 1, {'size': 128}, ('rgb', 'caption'));"
        "print(Stage('label:depth', 1, {'bits': 16}, ('depth',), (f,), 'org/depth', 'abc').id)"
    )
    command = [sys.executable, "-c", program]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == DEPTH.id


def test_resuming_is_subtraction(tmp_store: Store) -> None:
    ledger = Ledger(tmp_store)
    assert ledger.todo(FETCH, [2, 1, 0]) == [2, 1, 0]
    ledger.commit(FETCH, 1, fetched(1))
    ledger.quarantine(FETCH, 2, "worker was killed 3 times")
    assert ledger.todo(FETCH, [3, 2, 1, 0]) == [3, 0]
    assert ledger.quarantined(FETCH) == {2: "worker was killed 3 times"}
    assert ledger.committed(FETCH) == {1}
    assert [ledger.is_committed(FETCH, shard) for shard in range(3)] == [False, True, False]
    ledger.release(FETCH, 2)
    assert ledger.todo(FETCH, range(4)) == [0, 2, 3]


def test_a_shard_that_another_run_commits_after_all_is_no_longer_set_aside(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    ledger = Ledger(store)
    ledger.write_plan({"num_shards": 3})
    for shard in (0, 1):
        ledger.quarantine(FETCH, shard, "broken")
    ledger.commit(FETCH, 1, fetched(1))
    assert ledger.quarantined(FETCH) == {0: "broken"}
    (line,) = status(store)
    assert (line.done, line.quarantined, line.left) == (1, 1, 1)
    assert ledger.todo(FETCH, range(3)) == [2]


def test_attempts_count_up_and_can_be_forgotten(tmp_store: Store) -> None:
    ledger = Ledger(tmp_store)
    assert [ledger.attempt(FETCH, 5) for _ in range(3)] == [1, 2, 3]
    assert ledger.attempt(FETCH, 50) == 1
    ledger.release(FETCH, 5)
    assert ledger.attempt(FETCH, 5) == 1


def test_a_plan_never_changes(tmp_store: Store) -> None:
    ledger = Ledger(tmp_store)
    with pytest.raises(FileNotFoundError):
        ledger.read_plan()
    with pytest.raises(ValueError, match="num_shards"):
        ledger.write_plan({})
    for plan in ({"num_shards": 2, "a": 1}, {"a": 1, "num_shards": 2}):
        ledger.write_plan(plan)
    with pytest.raises(ValueError, match="planned otherwise"):
        ledger.write_plan({"num_shards": 3})
    assert ledger.read_plan() == {"num_shards": 2, "list_shards": 2, "passes": [], "a": 1}


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    ledger = Ledger(Store(str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="has not committed shard 4"):
        ledger.open_output(FETCH, 4, "rgb")
    with pytest.raises(ValueError, match="writes"):
        ledger.open_output(FETCH, 4, "depth")
    with pytest.raises(ValueError, match="not a commit"):
        Commit.from_dict({"stage": "x"})


def test_a_foreign_commit_in_a_stages_place_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(Store(str(tmp_path)))
    commit = ledger.commit(FETCH, 0, fetched(0))
    forged = replace(commit, fingerprint="0" * 64)
    ledger.store.write_json(f"commits/{FETCH.id}/shard-000000.json", asdict(forged))
    with pytest.raises(ValueError, match="is a commit of"):
        ledger.commits(FETCH)


def test_statuses_are_one_row_a_sample(tmp_path: Path) -> None:
    ledger = Ledger(Store(str(tmp_path)))
    for shard in (0, 1):
        ledger.commit(FETCH, shard, fetched(shard))
    table = ledger.statuses(FETCH)
    assert table.column_names == ["key", "reason", "detail", "shard"]
    assert table.num_rows == 8
    assert table["reason"].to_pylist().count("404") == 2
    assert ledger.statuses(DEPTH).num_rows == 0


def test_a_shard_that_is_released_while_it_is_asked_for_is_set_aside_no_longer(
    tmp_path: Path,
) -> None:
    class Behind(Store):
        """Its listings still tell of what another run has removed."""

        def list(self, prefix: str = "") -> list[str]:
            found = super().list(prefix)
            Ledger(Store(self.url)).release(FETCH, 1)
            return found

    ledger = Ledger(Behind(str(tmp_path)))
    for shard in (0, 1):
        ledger.quarantine(FETCH, shard, "broken")
    assert ledger.quarantined(FETCH) == {0: "broken"}


def test_records_of_other_kinds_are_refused_by_their_place(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    ledger = Ledger(store)
    for data in (b"3", b"{}", b'{"num_shards": "1"}', b"[" * 100_000):
        store.write("plan/plan.json", data)
        with pytest.raises(ValueError, match=r"plan/plan\.json"):
            ledger.read_plan()
    stage = Stage("fetch", 1, {}, ("caption", "rgb"))
    whole = asdict(ledger.commit(stage, 0, fetched(0)))
    path = f"commits/{stage.id}/shard-000001.json"
    for change in ({"samples": "4"}, {"created": None}, {"seconds": [1]}, {"drops": {"a": "b"}},
                   {"outputs": [1]}, {"status": {"path": [1]}}, {"novel": 1},
                   {"queues": {"shards": 10**400}}):  # fmt: skip
        store.write_json(path, whole | {"shard": 1} | change)
        with pytest.raises(ValueError, match=f"{path}: not a commit"):
            ledger.commits(stage)
    store.write(path, b"[" * 100_000)
    with pytest.raises(ValueError, match=path):
        ledger.commits(stage)
    for reason in (b"3", b'{"reason": 3}', b"{}"):
        store.write(f"quarantine/{stage.id}/shard-000002.json", reason)
        with pytest.raises(ValueError, match=r"shard-000002\.json tells no 'reason'"):
            ledger.quarantined(stage)
    report = verify(store)
    assert [place for place, _ in report.problems] == [path]
