"""Contracts of the manifests: aligned or refused, immutable, moved by compare-and-swap."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from infra import ledger as ledgers
from infra import manifest
from infra.ledger import Ledger, ShardData, Stage, commit_path
from infra.manifest import (
    Manifest,
    ManifestError,
    load_manifest,
    manifest_names,
    publish,
    versions,
)
from infra.shards import key_digest, sample_key, write_tar
from infra.store import Store
from infra.verify import verify

RGB = Stage("fetch", 1, {}, ("rgb",))
DEPTH = Stage("label:depth", 1, {}, ("depth",), (RGB,), "org/depth", "abc")
STAGES = {"rgb": RGB, "depth": DEPTH}


def fill(ledger: Ledger, stage: Stage, shard: int, rows: list[int]) -> None:
    keys = [sample_key(shard, row) for row in rows]
    tars = {modality: write_tar((f"{key}.x", b"") for key in keys) for modality in stage.outputs}
    ledger.commit(stage, shard, ShardData(keys, tars, [(key, "ok", "") for key in keys], 1.0))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return _filled(Store(str(tmp_path)))


def _filled(store: Store) -> Ledger:
    filled = Ledger(store)
    for stage in STAGES.values():
        for shard in range(3):
            fill(filled, stage, shard, [0, 1])
    return filled


def test_a_manifest_lists_what_training_reads(tmp_store: Store) -> None:
    ledger = _filled(tmp_store)
    splits = {"train": [1, 0], "val": [2]}
    published = publish(
        ledger, "cc", STAGES, [2, 0, 1], splits=splits, tokenizers={"depth": {"id": 1}},
        meta={"crops": [4, 1]},
    )
    found = load_manifest(ledger.store, "cc")
    assert found == published
    assert (found.name, found.version) == ("cc", 1)
    assert (found.shards("train"), found.shards("val")) == ([0, 1], [2])
    assert found.shards() == [0, 1, 2]
    assert found.samples(0) == 2
    assert found.key_digest(2) == key_digest([sample_key(2, 0), sample_key(2, 1)])
    assert found.meta == {"crops": [4, 1]}
    path, sha256 = found.path("depth", 1), found.sha256("depth", 1)
    assert ledger.store.local(path, sha256) == ledger.open_output(DEPTH, 1, "depth")[0]
    assert found.modalities["depth"]["model"] == "org/depth"
    for wrong in (
        lambda: found.shards("test"), lambda: found.path("clip", 0),
        lambda: found.samples(9),
    ):
        with pytest.raises(ValueError, match="cc"):
            wrong()


def test_equal_content_is_the_same_version_and_other_content_the_next(ledger: Ledger) -> None:
    for _ in range(2):
        assert publish(ledger, "cc", STAGES, range(3), meta={"size": (1, 2)}).version == 1
    assert publish(ledger, "cc", {"rgb": RGB}, range(3)).version == 2
    assert load_manifest(ledger.store, "cc").version == 2
    assert load_manifest(ledger.store, "cc", 1).modalities.keys() == STAGES.keys()
    assert manifest_names(ledger.store) == ["cc"]
    # What was published before and is wanted again is the next version, too.
    assert publish(ledger, "cc", STAGES, range(3), meta={"size": (1, 2)}).version == 3
    assert load_manifest(ledger.store, "cc").version == 3


def test_a_publisher_that_is_overtaken_leaves_the_later_version_current(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = manifest._write_version

    def slow(store: Store, name: str, content: dict[str, Any]) -> Manifest:
        made = write(store, name, content)
        monkeypatch.setattr(manifest, "_write_version", write)
        assert publish(ledger, "cc", {"rgb": RGB}, range(3)).version == 2
        return made

    monkeypatch.setattr(manifest, "_write_version", slow)
    assert publish(ledger, "cc", STAGES, range(3)).version == 1
    assert load_manifest(ledger.store, "cc").version == 2


def test_a_death_before_current_moved_is_repaired_by_publishing_again(ledger: Ledger) -> None:
    publish(ledger, "cc", {"rgb": RGB}, range(3))
    old = ledger.store.read("manifests/cc/CURRENT")
    publish(ledger, "cc", STAGES, range(3))
    ledger.store.write("manifests/cc/CURRENT", old)
    assert publish(ledger, "cc", STAGES, range(3)).version == 2
    assert load_manifest(ledger.store, "cc").version == 2


def test_publishers_at_once_end_with_every_version_and_the_latest_current(
    tmp_store: Store,
) -> None:
    ledger = _filled(tmp_store)
    with ThreadPoolExecutor(4) as pool:
        done = list(
            pool.map(lambda n: publish(ledger, "cc", STAGES, [0], meta={"n": n}), range(4))
        )
    assert sorted(m.version for m in done) == versions(ledger.store, "cc") == [1, 2, 3, 4]
    assert load_manifest(ledger.store, "cc").version == 4


def test_a_missing_modality_is_named(ledger: Ledger) -> None:
    fill(ledger, RGB, 3, [0, 1])
    with pytest.raises(ManifestError, match=r"shard 3 lacks depth: label:depth@"):
        publish(ledger, "cc", STAGES, range(4))
    with pytest.raises(ValueError, match="writes"):
        publish(ledger, "cc", {"clip": RGB}, [0])
    assert versions(ledger.store, "cc") == []


@pytest.mark.parametrize(
    ("rows", "message"), [([1, 0], "sample 0 is"), ([0], "1 samples here and 2 there")]
)
def test_other_keys_are_refused_and_named(
    ledger: Ledger, rows: list[int], message: str
) -> None:
    fill(ledger, RGB, 3, [0, 1])
    fill(ledger, DEPTH, 3, rows)
    with pytest.raises(ManifestError, match=rf"shard 3: depth .* and rgb .*{message}"):
        publish(ledger, "cc", STAGES, range(4))


def test_splits_must_part_the_published_shards(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="in both"):
        publish(ledger, "cc", STAGES, range(3), splits={"train": [0, 1], "val": [1]})
    with pytest.raises(ValueError, match="not published"):
        publish(ledger, "cc", STAGES, [0], splits={"train": [0], "val": [1]})
    with pytest.raises(ValueError, match="at least one shard"):
        publish(ledger, "cc", STAGES, [])


def test_what_is_no_manifest_is_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="manifests/cc/CURRENT"):
        load_manifest(store, "cc")
    store.write("manifests/cc/v0001.json", b'{"entries": {}}')
    with pytest.raises(ManifestError, match="not a manifest"):
        load_manifest(store, "cc", 1)
    store.write("manifests/cc/v0001.json", b"[" * 100_000)
    with pytest.raises(ValueError, match=r"v0001\.json is not valid JSON"):
        load_manifest(store, "cc", 1)
    for current in (b"3", b"{}", b'{"version": Infinity}', b'{"version": "1"}'):
        store.write("manifests/cc/CURRENT", current)
        with pytest.raises(ManifestError, match="manifests/cc/CURRENT holds no version"):
            load_manifest(store, "cc")


def test_a_manifest_that_tells_nothing_of_a_shard_is_refused_where_it_is_asked() -> None:
    whole = {"path": "shards/x.tar", "sha256": "00"}
    for output in (None, 3, {}, {"path": 3}, {"path": None, "sha256": []}):
        entry = {"outputs": {"rgb": whole, "depth": output}}
        found = Manifest("cc", 1, {"rgb": {}, "depth": {}}, {0: entry}, {"train": [0]})
        assert found.path("rgb", 0) == "shards/x.tar"
        for ask in (lambda m: m.path("depth", 0), lambda m: m.sha256("depth", 0),
                    lambda m: m.samples(0), lambda m: m.key_digest(0)):  # fmt: skip
            with pytest.raises(ManifestError, match="cc v1: shard 0 tells no "):
                ask(found)
    with pytest.raises(ManifestError, match="splits"):
        Manifest.from_dict({**found.to_dict(), "splits": {"train": 3}})


class StaleLists(Store):
    """Listings do not tell of manifests: some services take a while until they do."""

    def list(self, prefix: str = "") -> list[str]:
        return [path for path in super().list(prefix) if not path.startswith("manifests/")]


def test_a_listing_that_is_behind_loses_no_version_and_makes_none_twice(tmp_path: Path) -> None:
    ledger = _filled(StaleLists(str(tmp_path)))
    for number in (1, 2):
        assert publish(ledger, "cc", STAGES, range(3), meta={"n": number}).version == number
        assert publish(ledger, "cc", STAGES, range(3), meta={"n": number}).version == number
    assert load_manifest(ledger.store, "cc").meta == {"n": 2}
    assert versions(Store(str(tmp_path)), "cc") == [1, 2]


def test_publishing_and_verifying_hold_a_few_commits_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "_AHEAD", 16)
    ledger = _filled(Store(str(tmp_path)))
    commit = asdict(ledger.read_commit(RGB, 0))
    shards = range(300)
    for shard in shards:
        record = commit | {"shard": shard, "info": {str(n): n for n in range(1000)}}
        ledger.store.write_json(commit_path(RGB.id, shard), record)
    verify(ledger.store)
    for call in (lambda: publish(ledger, "cc", {"rgb": RGB}, shards), lambda: verify(ledger.store)):
        tracemalloc.start()
        call()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 10e6, "all commits at once take 28 MB"
