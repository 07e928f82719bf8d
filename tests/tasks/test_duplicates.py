"""Repeated pictures: found across shards, the first stays, and dropping is a choice."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from infra.ledger import Ledger, ShardData, Stage
from infra.shards import read_tar, sample_key, write_tar
from infra.store import Store
from tasks import duplicates
from tasks.duplicates import (
    NEAR_BITS,
    build_work,
    distinct_job,
    distinct_stage,
    find_duplicates,
    mark_duplicates,
)
from tasks.pictures import PicturePolicy, cleaned

BASE = int.from_bytes(np.random.default_rng(0).bytes(8), "big")


def picture(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((200, 160), Image.Resampling.BICUBIC)


def dhash(image: Image.Image, **options: object) -> int:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return cleaned(buffer.getvalue(), PicturePolicy(size=128)).dhash


def test_a_picture_that_is_scaled_and_recompressed_keeps_its_hash_nearly():
    for seed in range(8):
        original = dhash(picture(seed), quality=95)
        copy = dhash(picture(seed).resize((310, 248)), quality=40)
        assert (original ^ copy).bit_count() <= NEAR_BITS
        assert (original ^ dhash(picture(seed + 100), quality=95)).bit_count() > 12


def found(digests: list[int], hashes: list[int]) -> tuple[list[int], list[int]]:
    first, bits = find_duplicates(np.array(digests, np.uint64), np.array(hashes, np.uint64))
    return first.tolist(), bits.tolist()


def test_equal_bytes_equal_hashes_and_alike_hashes_name_the_first_that_stays():
    hashes = [BASE, BASE, BASE, BASE ^ 1, BASE ^ 0b1111, ~BASE & (1 << 64) - 1, BASE ^ 0b1110]
    first, bits = found([1, 1, 2, 3, 4, 5, 6], hashes)
    assert first == [-1, 0, 0, 0, -1, -1, 0]
    assert bits == [-1, -1, 0, 1, -1, -1, 3]


def test_flat_pictures_are_alike_only_when_their_bytes_are_equal():
    assert found([1, 2, 1], [0, 0, 0])[0] == [-1, -1, 0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 63), max_size=5), max_size=24))
def test_near_duplicates_agree_with_comparing_all_pairs(flips):
    hashes = [BASE ^ sum(1 << bit for bit in set(flip)) for flip in flips]
    first, _ = found(list(range(len(hashes))), hashes)
    kept: list[int] = []
    for number, value in enumerate(hashes):
        if not 5 <= value.bit_count() <= 59:
            assert first[number] == -1
            continue
        alike = [k for k in kept if (hashes[k] ^ value).bit_count() <= NEAR_BITS]
        assert (first[number] >= 0) == bool(alike)
        if not alike:
            kept.append(number)


def test_a_very_common_part_of_hashes_is_compared_whole_in_memory_of_one_list():
    hashes = np.arange(1, 3001, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mask = duplicates._PARTS[0] | duplicates._PARTS[1] | duplicates._PARTS[2]
    hashes &= ~mask
    tracemalloc.start()
    pairs = np.concatenate(list(duplicates._pairs(hashes, np.arange(3000), mask, [])))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    later, earlier = np.nonzero(np.tril(apart <= duplicates.NEAR_BITS, -1))
    assert set(zip(later, earlier, strict=True)) == {(a, b) for a, b, _ in pairs.tolist()}
    assert peak < 8e6, "all with all take 72 MB"


@pytest.fixture
def dataset(tmp_path) -> tuple[Store, Stage]:
    """Two shards: the second repeats a picture of the first, and one that is alike."""
    store, stage = Store(str(tmp_path)), Stage("fetch", 1, {}, ("rgb", "caption"))
    rows = [[(1, BASE), (2, ~BASE & (1 << 64) - 1)], [(1, BASE), (3, BASE ^ 1), (4, BASE ^ 0xFF)]]
    for shard, content in enumerate(rows):
        keys = [sample_key(shard, row) for row in range(len(content))]
        pictures = [bytes([digest]) for digest, _ in content]
        outputs = {
            "rgb": write_tar(zip([f"{k}.jpg" for k in keys], pictures, strict=True)),
            "caption": write_tar((f"{k}.txt", b"x") for k in keys),
        }
        columns = {
            "stored_sha256": pa.array([f"{digest:064x}"[::-1] for digest, _ in content]),
            "dhash": pa.array([value for _, value in content], pa.uint64()),
        }
        data = ShardData(keys, outputs, [(k, "ok", "") for k in keys], 1.0, columns=columns)
        Ledger(store).commit(stage, shard, data)
    return store, stage


def test_duplicates_across_shards_are_marked_and_nothing_is_lost(dataset):
    store, stage = dataset
    path, table = mark_duplicates(store, stage)
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        (sample_key(1, 0), sample_key(0, 0), "duplicate", 0),
        (sample_key(1, 1), sample_key(0, 0), "near_duplicate", 1),
    ]
    data = store.read(path)
    assert mark_duplicates(store, stage)[0] == path
    assert store.read(path) == data


@pytest.mark.parametrize(("drop", "left"), [("drop_exact", 2), ("drop_near", 1)])
def test_dropping_writes_a_stage_of_its_own_with_the_reason_for_each(dataset, drop, left):
    store, stage = dataset
    path, _ = mark_duplicates(store, stage)
    job = distinct_job(store, stage, drop, path)
    assert job.shards == (0, 1)
    built = build_work(store.url, job.stage, job.config)
    first, second = built.run(0), built.run(1)
    original = Ledger(store).read_commit(stage, 0).outputs["rgb"]
    assert first.outputs["rgb"] == store.read(original["path"])
    assert len(second.keys) == len(list(read_tar(second.outputs["caption"]))) == left
    commit = Ledger(store).commit(distinct_stage(stage, drop), 1, second)
    assert commit.drops["duplicate"] == 1
    assert commit.drops.get("near_duplicate", 0) == 2 - left
