"""Contracts of the loader: order, holes, crops, refusals."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest

from infra.blocks import BlockWriter, Column
from infra.ledger import Ledger, ShardData, Stage
from infra.manifest import publish
from infra.shards import hole, sample_key, write_tar
from infra.store import Store
from models.fourm.loader import EpochOrder, TokenDataset
from models.fourm.spec import EOS_ID, ModalitySpec
from models.fourm.vectors import read_vectors, valid_vectors
from tasks.train import modality_specs
from tests.models.token_set import ROWS, make_set


@pytest.fixture(scope="module")
def token_set(tmp_path_factory):
    return make_set(str(tmp_path_factory.mktemp("set")))


def dataset(token_set, **options):
    store, manifest = token_set
    return TokenDataset(store, manifest, "train", modality_specs(manifest, max_text=8), **options)


def _rows(order: EpochOrder, start: int, count: int) -> list[tuple[float, ...]]:
    return [tuple(each[:2]) for each in order.places(np.arange(start, start + count)).tolist()]


def test_every_epoch_visits_every_sample_once_in_another_order():
    order = EpochOrder([700, 3, 512], seed=1)
    epochs = [_rows(order, e * 1215, 1215) for e in range(2)]
    assert len(set(epochs[0])) == len(set(epochs[1])) == order.total == 1215
    assert epochs[0] != epochs[1]


def test_windows_cover_sets_of_many_blocks():
    order = EpochOrder([256] * 130, seed=0)
    assert len(set(_rows(order, 0, order.total))) == order.total


def test_the_batch_of_a_step_depends_on_nothing_but_the_step(token_set):
    forward, backward = dataset(token_set), dataset(token_set)
    first = [forward.batch_at(step, 8) for step in range(6)]
    last = [backward.batch_at(step, 8) for step in reversed(range(6))][::-1]
    for a, b in zip(first, last, strict=True):
        np.testing.assert_array_equal(a.grids["tok_rgb@32"], b.grids["tok_rgb@32"])
        np.testing.assert_array_equal(a.pixels["rgb@32"], b.pixels["rgb@32"])


def test_files_of_few_shards_stay_open_and_batches_are_the_same(tmp_path, monkeypatch):
    store, manifest = make_set(str(tmp_path))
    wanted = [dataset((store, manifest)).batch_at(step, 8) for step in range(4)]
    monkeypatch.setattr("models.fourm.loader._MOST_FILES", 4)
    data = dataset((store, manifest))
    for step, before in enumerate(wanted):
        again = data.batch_at(step, 8)
        for name in before.grids:
            np.testing.assert_array_equal(before.grids[name], again.grids[name])
        np.testing.assert_array_equal(before.sequences["caption"][0], again.sequences["caption"][0])
        np.testing.assert_array_equal(before.pixels["rgb@32"], again.pixels["rgb@32"])
    del wanted, before, again
    maps = Path("/proc/self/maps").read_text()
    assert len({line.split()[-1] for line in maps.splitlines() if str(tmp_path) in line}) == 4


def test_workers_share_a_batch_without_overlap(token_set):
    data = dataset(token_set)
    whole = data.batch_at(3, 8).grids["tok_rgb@32"]
    parts = [data.batch_at(3, 8, slice(rank, None, 2)).grids["tok_rgb@32"] for rank in range(2)]
    np.testing.assert_array_equal(whole[0::2], parts[0])
    np.testing.assert_array_equal(whole[1::2], parts[1])


def test_holes_are_reported_and_texts_end_with_eos_unless_cut(token_set):
    samples = dataset(token_set).batch_at(0, 2 * ROWS)
    assert (~samples.present["tok_depth@32"]).sum() == 2
    ids, length = samples.sequences["caption"]
    assert length.max() <= 8
    ends = ids[np.arange(len(ids)), length - 1]
    assert ((ends == EOS_ID) | (length == 8)).all()


def test_pixels_and_tokens_come_from_the_same_crop(token_set):
    data = dataset(token_set, cache_bytes=0)
    centre, other = (data.samples([(0, 5, crop)]) for crop in (0.0, 0.9))
    reader = data._shard(0).tokens["tok_rgb@32"]
    np.testing.assert_array_equal(other.grids["tok_rgb@32"][0], reader.fixed_rows("crop1", [5])[0])
    assert (centre.pixels["rgb@32"] != other.pixels["rgb@32"]).any()


def test_a_set_that_lacks_a_modality_is_refused_by_name(token_set):
    store, manifest = token_set
    fewer = dataclasses.replace(
        manifest, modalities={k: v for k, v in manifest.modalities.items() if k != "tok_depth"}
    )
    with pytest.raises(ValueError, match="lacks tok_depth; it has caption, rgb, tok_rgb"):
        TokenDataset(store, fewer, "train", modality_specs(manifest, max_text=8))


def test_tokens_outside_the_vocabulary_are_refused(token_set):
    store, manifest = token_set
    specs = [dataclasses.replace(s, vocab_size=8) if s.kind == "img" else s
             for s in modality_specs(manifest, max_text=8)]
    with pytest.raises(ValueError, match="outside the vocabulary of 8"):
        TokenDataset(store, manifest, "train", specs)


def stored(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    if set(arrays) == {"emb"}:
        np.save(buffer, arrays["emb"])
    else:
        np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def fact_set(tmp_path_factory):
    """Four samples with five facts each, and T5 vectors as .npz, .npy, too many, and a hole."""
    store = Store(str(tmp_path_factory.mktemp("facts")))
    keys = [sample_key(0, row) for row in range(4)]
    table = np.arange(18, dtype=np.float16).reshape(6, 3)
    valid = np.array([True, True, False, False, False, False])
    members = [(f"{keys[0]}.npz", stored(emb=table, mask_valid=valid)),
               (f"{keys[1]}.npy", stored(emb=table[:3])), (f"{keys[2]}.npy", stored(emb=table)),
               hole(keys[3], "no caption")]
    writer = BlockWriter({"crop0": Column("uint16", None)}, {})
    for key in keys:
        writer.add(key, {"crop0": [token for i in range(5) for token in (210 + i, 310 + i)]})
    ledger, stages = Ledger(store), {}
    for name, data in (("t5_caption", write_tar(members)), ("metadata", writer.finish())):
        stages[name] = Stage(name=f"make:{name}", version=1, params={}, outputs=(name,))
        ledger.commit(stages[name], 0, ShardData(keys, {name: data}, [(key, "ok", "")
                                                                     for key in keys], 0.1))
    tokenizers = {"t5_caption": {"num_tokens": 4, "channels": 3}, "text": {"vocab_size": 400}}
    return store, publish(ledger, "facts", stages, range(1), splits={"train": [0]},
                          tokenizers=tokenizers, meta={"crops": {"num_crops": 1, "size": 32}})


def fact_specs(width: int = 3) -> list[ModalitySpec]:
    return [ModalitySpec(name="t5_caption", kind="seq_emb", max_tokens=4, channels=width,
                         is_target=False),
            ModalitySpec(name="metadata", kind="seq", max_tokens=7, vocab_size=400, chunk=2)]


def test_feature_vectors_come_with_their_lengths_and_holes(fact_set):
    samples = TokenDataset(*fact_set, "train", fact_specs()).fixed(0, 4)
    vectors, length = samples.vectors["t5_caption"]
    assert length.tolist() == [2, 3, 4, 0]
    assert samples.present["t5_caption"].tolist() == [True, True, True, False]
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors[1, :3].reshape(-1), np.arange(9))
    assert not vectors[0, 2:].any()


def test_sequences_of_chunks_are_not_cut_before_they_are_shuffled(fact_set):
    ids, length = TokenDataset(*fact_set, "train", fact_specs()).fixed(0, 4).sequences["metadata"]
    assert length.tolist() == [11] * 4
    assert (ids[:, 10] == EOS_ID).all()


def test_vectors_of_another_width_are_refused_before_anything_runs(fact_set):
    with pytest.raises(ValueError, match="t5_caption: vectors of 3 values, the model takes 5"):
        TokenDataset(*fact_set, "train", fact_specs(5))


def test_a_manifest_tells_vectors_by_their_width(fact_set):
    manifest = fact_set[1]
    only = dataclasses.replace(manifest, modalities={
        "t5_caption": manifest.modalities["t5_caption"]})
    assert modality_specs(only, max_text=8) == tuple(fact_specs()[:1])


@pytest.mark.parametrize(("value", "sentence"), [
    ({"x": np.zeros((2, 3))}, "need 'emb', the value has"),
    (np.zeros(3), r"must be floats \[L, C\], got float64 \(3,\)"),
    (np.zeros((2, 3), int), "must be floats"),
])
def test_what_is_no_table_of_vectors_is_refused(value, sentence):
    with pytest.raises(ValueError, match=sentence):
        valid_vectors(value)


def test_vectors_are_never_unpickled():
    buffer = io.BytesIO()
    np.save(buffer, np.array([[{}]], object))
    with pytest.raises(ValueError, match="pickled objects"):
        read_vectors(buffer.getvalue(), "npy")
    with pytest.raises(ValueError, match="stored as npy or npz, not as 'pickle'"):
        read_vectors(b"", "pickle")
