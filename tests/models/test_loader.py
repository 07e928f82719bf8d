"""Contracts of the loader: order, holes, crops, refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from models.fourm.loader import EpochOrder, TokenDataset
from models.fourm.spec import EOS_ID
from tasks.train import modality_specs
from tests.models.token_set import ROWS, make_set


@pytest.fixture(scope="module")
def token_set(tmp_path_factory):
    return make_set(str(tmp_path_factory.mktemp("set")))


def dataset(token_set, **options):
    store, manifest = token_set
    return TokenDataset(store, manifest, "train", modality_specs(manifest, max_text=8), **options)


def test_every_epoch_visits_every_sample_once_in_another_order():
    order = EpochOrder([700, 3, 512], seed=1)
    epochs = [[order.at(e * 1215 + i)[:2] for i in range(1215)] for e in range(2)]
    assert len(set(epochs[0])) == len(set(epochs[1])) == order.total == 1215
    assert epochs[0] != epochs[1]


def test_windows_cover_sets_of_many_blocks():
    order = EpochOrder([256] * 130, seed=0)
    assert len({order.at(i)[:2] for i in range(order.total)}) == order.total


def test_the_batch_of_a_step_depends_on_nothing_but_the_step(token_set):
    forward, backward = dataset(token_set), dataset(token_set)
    first = [forward.batch_at(step, 8) for step in range(6)]
    last = [backward.batch_at(step, 8) for step in reversed(range(6))][::-1]
    for a, b in zip(first, last, strict=True):
        np.testing.assert_array_equal(a.grids["tok_rgb@32"], b.grids["tok_rgb@32"])
        np.testing.assert_array_equal(a.pixels["rgb@32"], b.pixels["rgb@32"])


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
