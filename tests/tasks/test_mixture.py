"""Contracts of mixtures of token sets: exact shares, pure functions of the step, holes."""

from __future__ import annotations

import dataclasses
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.fourm.masking import Component, Mixture, Samples
from tasks.mixture import CYCLE, Interleave, bind, merged, open_sets, phase_weights, quota
from tasks.recipes import Phase, Source, TrainRecipe
from tasks.train import FourMTask, train_fourm
from tasks.trainer import TrainConfig
from tests.models.token_set import make_set
from tests.tasks.test_train import TINY

FULL = Component(inputs={"*": 1.0}, targets={"*": 1.0}, num_inputs=(4, 8), num_targets=(8, 8))
PIXELS = Component(inputs={"rgb": 1.0}, targets={"tok_rgb": 1.0}, num_inputs=(4, 4),
                   num_targets=(4, 4))
WORDS = Component(inputs={"caption": 1.0}, targets={"caption": 1.0}, num_inputs=(4, 4),
                  num_targets=(8, 8))
MIXED = TrainRecipe(
    network=TINY.network, mixture=TINY.mixture, max_text=12, val_samples=4,
    training=TrainConfig(steps=8, batch_size=8, lr=1e-3, warmup_steps=1, precision="fp32",
                         log_every=1),
    sources=(
        Source(name="pictures", weight=0.6, mixture=Mixture(components=(FULL, PIXELS))),
        Source(name="plain", weight=0.2, mixture=Mixture(components=(PIXELS,)),
               modalities=("rgb", "tok_rgb")),
        Source(name="texts", weight=0.2, mixture=Mixture(components=(WORDS,))),
    ),
)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("sets"))
    pictures = make_set(root)
    plain = make_set(root, "plain")
    texts = make_set(str(tmp_path_factory.mktemp("texts")), "texts", held=("caption",))
    return {"pictures": [pictures], "plain": [plain], "texts": [texts]}


def task_of(sets, recipe=MIXED):
    return FourMTask(sets["pictures"][0][0], sets, recipe)


weights = st.lists(st.integers(1, 50), min_size=1, max_size=4).map(
    lambda parts: [float(part) for part in parts])


@settings(max_examples=25, deadline=None)
@given(weights, weights, st.integers(0, 2500), st.integers(0, 5))
def test_units_of_every_source_are_counted_without_gaps_or_repeats(first, second, change, seed):
    size = min(len(first), len(second))
    phases = [(0, first[:size]), (change + 1, second[:size])]
    interleave = Interleave(phases, seed)
    seen: Counter[int] = Counter()
    for position in range(4000):
        source, number = interleave.at(position)
        assert number == seen[source]
        seen[source] += 1


@settings(deadline=None)
@given(weights)
def test_every_cycle_holds_the_share_of_each_source(parts):
    counts = quota(parts)
    assert counts.sum() == CYCLE
    assert np.abs(counts - np.array(parts) / sum(parts) * CYCLE).max() <= 1


def test_shares_too_small_to_be_drawn_are_refused():
    with pytest.raises(ValueError, match="at least 1/1000 of their sum"):
        quota([1.0, 1e-6])
    assert quota([1.0, 0.0]).tolist() == [CYCLE, 0]


def test_a_batch_is_the_same_for_any_number_of_workers(sets):
    task = task_of(sets)
    for step in range(4):
        whole = task.batch(step, 0, 1)
        for world in (2, 4):
            for rank in range(world):
                part = task.batch(step, rank, world)
                assert torch.equal(part.enc_ids, whole.enc_ids[rank::world])
                assert torch.equal(part.dec_mod, whole.dec_mod[rank::world])
                assert torch.equal(part.dec_ids, whole.dec_ids[rank::world])


def test_a_batch_depends_on_nothing_but_the_step(sets):
    task, other = task_of(sets), pickle.loads(pickle.dumps(task_of(sets)))
    forward = [task.batch(step, 0, 1) for step in range(5)]
    backward = [other.batch(step, 0, 1) for step in reversed(range(5))][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert torch.equal(a.enc_pos, b.enc_pos)
        assert torch.equal(a.targets, b.targets)


def test_samples_are_masked_by_the_components_of_their_own_source(sets):
    task = task_of(sets)
    caption, rgb = (task.config.index(name) for name in ("caption", "rgb@32"))
    kinds: Counter[str] = Counter()
    for step in range(40):
        batch = task.batch(step, 0, 1)
        _, source = task.data._loaded(step, 0, 1)
        for row, owner in enumerate(source):
            used = {int(m) for m in batch.enc_mod[row] if m >= 0}
            shown = used | {int(m) for m in batch.dec_mod[row] if m >= 0}
            kinds[task.bound[owner].source.name] += 1
            if owner == 1:
                assert used == {rgb}
                assert caption not in shown
            if owner == 2:
                assert shown == {caption}
    assert kinds["pictures"] > kinds["plain"] > 0
    assert kinds["texts"] > 0


def test_a_batch_of_texts_alone_reaches_every_parameter_as_workers_exchange_gradients_of_all(sets):
    task = task_of(sets)
    model = task.build_model()
    batches = [task.batch(step, rank, 8) for step in range(4) for rank in range(8)]
    batch = next(one for one in batches if not any(len(d.slots) for d in one.dense.values()))
    model(batch.to(torch.device("cpu"))).total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_masking_per_batch_draws_whole_batches_from_one_source(sets):
    parts = tuple(dataclasses.replace(source, mixture=Mixture(
        components=source.mixture.components, per_batch=True)) for source in MIXED.sources)
    task = task_of(sets, dataclasses.replace(MIXED, sources=parts))
    owners = [np.unique(task.data._loaded(step, 0, 1)[1]) for step in range(60)]
    assert {len(owner) for owner in owners} == {1}
    assert {int(owner[0]) for owner in owners} == {0, 1, 2}
    for step in range(6):
        task.batch(step, 0, 1)
    with pytest.raises(ValueError, match="either all sources mask per batch, or none"):
        task_of(sets, dataclasses.replace(MIXED, sources=(*parts[:2], MIXED.sources[2])))


def test_repeats_mask_the_same_samples_anew_and_then_load_others(sets):
    task = task_of(sets, dataclasses.replace(MIXED, repeats=2))
    loaded = [task.data._loaded(step // 2, 0, 1)[0].grids["tok_rgb@32"] for step in range(3)]
    np.testing.assert_array_equal(loaded[0], loaded[1])
    assert (loaded[1] != loaded[2]).any()
    assert not torch.equal(task.batch(0, 0, 1).enc_pos, task.batch(1, 0, 1).enc_pos)


def test_a_curriculum_changes_weights_at_its_share_of_the_run(sets):
    phases = (Phase(since=0.5, sources={"texts": 0.0, "plain": 0.0},
                    components={"pictures": (0.0, 1.0)}),)
    task = task_of(sets, dataclasses.replace(MIXED, phases=phases))
    assert [step for step, _ in phase_weights(task.recipe)] == [0, 4]
    for step in range(4, 8):
        assert set(task.data._loaded(step, 0, 1)[1]) == {0}
        batch = task.batch(step, 0, 1)
        assert set(batch.enc_mod.unique().tolist()) <= {task.config.index("rgb@32"), -1}
    before = [task.data._loaded(step, 0, 1)[1] for step in range(4)]
    plain = task_of(sets)
    for step, source in enumerate(before):
        np.testing.assert_array_equal(source, plain.data._loaded(step, 0, 1)[1])


def test_phases_never_split_a_load():
    recipe = dataclasses.replace(MIXED, repeats=3, phases=(Phase(since=0.5),))
    assert [step for step, _ in phase_weights(recipe)] == [0, 6]


def test_training_on_a_mixture_measures_every_source(sets):
    store = sets["pictures"][0][0]
    info = train_fourm(store, sets, MIXED, run="mixed")
    assert {"val/pictures/rgb->caption", "val/plain/rgb->tok_rgb", "val/texts/caption"} <= \
        info.metrics.keys()
    assert all(np.isfinite(value) for value in info.metrics.values())
    record = store.read_json("runs/mixed/run.json")
    assert [one[1] for one in record["data"]["texts"]] == ["texts"]
    assert train_fourm(store, sets, MIXED, run="mixed") == info
    fewer = {**sets, "plain": sets["pictures"]}
    with pytest.raises(ValueError, match="another data; choose another run name"):
        train_fourm(store, fewer, MIXED, run="mixed")


def test_data_and_sources_must_agree(sets):
    store = sets["pictures"][0][0]
    with pytest.raises(ValueError, match="lacks data for texts"):
        bind(MIXED, {name: sets[name] for name in ("pictures", "plain")})
    with pytest.raises(ValueError, match="knows no source more; its sources are pictures"):
        bind(MIXED, {**sets, "more": sets["plain"]})
    with pytest.raises(ValueError, match="the recipe mixes pictures, plain, texts: name"):
        open_sets(store, MIXED, "set")
    with pytest.raises(ValueError, match=r"no manifest 'none' in .*; there are plain, set"):
        open_sets(store, TINY, "none")
    elsewhere = sets["texts"][0][0].url
    given = {"pictures": "set", "plain": "plain", "texts": f"{elsewhere}#texts"}
    found = open_sets(store, MIXED, given)
    assert {name: parts[0][1].name for name, parts in found.items()} == {
        "pictures": "set", "plain": "plain", "texts": "texts"}


def test_sources_with_different_tokenizers_are_refused(sets):
    store, manifest = sets["plain"][0]
    other = {**manifest.tokenizers, "rgb": {**manifest.tokenizers["rgb"], "fingerprint": "new"}}
    odd = dataclasses.replace(manifest, tokenizers=other)
    with pytest.raises(ValueError, match="tok_rgb@32 has other tokens in plain than in pictures"):
        task_of({**sets, "plain": [(store, odd)]})


def test_two_resolutions_of_the_same_samples_are_read_side_by_side(tmp_path):
    store, low = make_set(str(tmp_path))
    _, high = make_set(str(tmp_path), "high", held=("rgb", "tok_rgb"), grid=4)
    fine = Component(inputs={"tok_rgb@32": 1.0, "rgb@64": 1.0}, targets={"tok_rgb": 1.0},
                     num_inputs=(4, 8), num_targets=(16, 16))
    recipe = dataclasses.replace(
        TINY, mixture=Mixture(components=(fine,)), predicts=("tok_rgb@64",),
        modalities=("caption", "rgb@32", "rgb@64", "tok_rgb@32", "tok_rgb@64"))
    task = FourMTask(store, open_sets(store, recipe, "set+high"), recipe)
    assert [spec.name for spec in task.config.targets] == ["tok_rgb@64"]
    samples, _ = task.data._loaded(0, 0, 1)
    assert samples.grids["tok_rgb@32"].shape == (8, 4)
    assert samples.grids["tok_rgb@64"].shape == (8, 16)
    assert task.batch(0, 0, 1).counts[task.config.index("tok_rgb@64")] == 8 * 16
    shuffled = dataclasses.replace(high, splits={"train": [1, 2], "val": [0]})
    task = FourMTask(store, {"main": [(store, low), (store, shuffled)]}, recipe)
    with pytest.raises(ValueError, match="set and high do not hold the same samples"):
        _ = task.data


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=12))
def test_merging_keeps_the_order_of_samples_and_marks_what_is_absent(owners):
    source = np.array(owners)
    parts = {}
    for number in set(owners):
        size = owners.count(number)
        rows = np.arange(size)
        grids = {"g": np.stack([np.full(3, 100 * number + row) for row in rows])} \
            if number else {}
        text = np.full((size, 2 + number), 1), np.full(size, 2 + number)
        present = {"g": rows % 2 == 0} if number == 2 else {}
        parts[number] = Samples(grids=grids, sequences={"t": text}, present=present)
    whole, taken = merged(parts, source), Counter[int]()
    for row, owner in enumerate(owners):
        number = taken[owner]
        taken[owner] += 1
        assert whole.sequences["t"][1][row] == 2 + owner
        here = owner != 0 and (owner != 2 or number % 2 == 0)
        if "g" in whole.grids:
            assert bool(whole.present.get("g", np.ones(len(owners), bool))[row]) == here
        if here:
            assert whole.grids["g"][row, 0] == 100 * owner + number
