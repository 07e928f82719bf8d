"""Contracts of masking: spans, budgets, static and full batches, disjoint inputs and targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.fourm.draws import Draws
from models.fourm.masking import Component, Mixture, Samples, mask_batch, transfer_batch
from models.fourm.spans import (
    cut_chunks,
    cut_targets,
    fit_inputs,
    fit_vectors,
    merge_spans,
    shuffle_chunks,
    span_mask,
)
from models.fourm.spec import EOS_ID, FourMConfig, ModalitySpec

S1, S2, S3 = 5, 6, 7
CONFIG = FourMConfig(modalities=(
    ModalitySpec(name="rgb", kind="pixels", max_tokens=16, is_target=False),
    ModalitySpec(name="depth", kind="img", max_tokens=16, vocab_size=99),
    ModalitySpec(name="normal", kind="img", max_tokens=16, vocab_size=99),
    ModalitySpec(name="text", kind="seq", max_tokens=12, vocab_size=400),
))
NAMES = [m.name for m in CONFIG.modalities]


def samples(batch: int = 6) -> Samples:
    """Grid ids are their positions; texts have 3 to 12 ids."""
    rng = np.random.default_rng(0)
    length = rng.integers(3, 13, batch)
    ids = rng.integers(204, 400, (batch, 12))
    ids[np.arange(batch), length - 1] = EOS_ID
    ids[np.arange(12) >= length[:, None]] = 0
    grid = np.broadcast_to(np.arange(16), (batch, 16))
    pixels = rng.integers(0, 255, (batch, 16, 768), np.uint8)
    return Samples(grids={"depth": grid, "normal": grid}, sequences={"text": (ids, length)},
                   pixels={"rgb": pixels})


def mixture(**change) -> Mixture:
    alphas = dict.fromkeys(NAMES, 0.5)
    settings = {"inputs": alphas, "targets": dict.fromkeys(["depth", "normal", "text"], 0.5),
                "num_inputs": (20, 20), "num_targets": (12, 12), **change}
    return Mixture(components=(Component(**settings),))


@pytest.mark.parametrize(("keep", "inputs", "targets"), [
    ([1, 1, 1], [301, 302, EOS_ID], [S1]),
    ([0, 0, 0], [S1], [S1, 301, 302, EOS_ID, S2]),
    ([0, 1, 0], [S1, 302, S2], [S1, 301, S2, EOS_ID, S3]),
    ([1, 0, 0], [301, S1], [S1, 302, EOS_ID, S2]),
])
def test_runs_of_removed_tokens_become_sentinels(keep, inputs, targets):
    ids, length = np.array([[301, 302, EOS_ID, 0]]), np.array([3])
    (got, n), (want, m) = span_mask(ids, length, np.array([[*keep, 0]], bool))
    assert got[0, : n[0]].tolist() == inputs
    assert want[0, : m[0]].tolist() == targets


@pytest.mark.parametrize(("ahead", "last"), [(1, 2), (16, 15)])
def test_inputs_over_budget_are_drawn_again_with_lower_probability(ahead, last):
    ids = np.array([[301, 302, 303, EOS_ID]] * 2)
    made: list[tuple[int, int]] = []

    def draw(attempts: np.ndarray, rows: np.ndarray) -> np.ndarray:
        made.extend(zip(attempts.tolist(), rows.tolist(), strict=True))
        return np.where(attempts[:, None] >= 2, [[0.95, 0.95, 0.95, 0.95]], 0.0)

    inputs, targets = fit_inputs(ids, np.array([4, 4]), np.ones(2), np.array([1, 4]), draw,
                                 most_ahead=ahead)
    assert made == [(0, 0), (0, 1), *((attempt, 0) for attempt in range(1, last + 1))]
    assert inputs[1].tolist() == [1, 4]
    assert targets[0][0, :6].tolist() == [S1, 301, 302, 303, EOS_ID, S2]


@given(st.lists(st.tuples(st.integers(1, 140), st.integers(1, 140), st.integers(1, 8)),
                min_size=1, max_size=6), st.integers(0, 99), st.sampled_from([1, 2, 16]))
@settings(max_examples=40, deadline=None)
def test_the_first_attempt_whose_input_fits_counts_however_many_are_made_at_once(
    texts, seed, ahead
):
    length, budget, eighths = (np.array(column) for column in zip(*texts, strict=True))
    ids = np.where(np.arange(length.max()) < length[:, None], 300, 0)
    numbers = np.random.default_rng(seed).integers(0, 64, (400, *ids.shape)) / 64
    inputs, targets = fit_inputs(ids, length, eighths / 8, budget,
                                 lambda attempts, rows: numbers[attempts, rows], most_ahead=ahead)
    for row in range(len(ids)):
        one = slice(row, row + 1)
        for attempt in range(400):
            keep = numbers[attempt, one] < eighths[row] / 8 * 0.9**attempt
            shown, wanted = span_mask(ids[one], length[one], keep)
            if shown[1][0] <= budget[row]:
                break
        for (got, count), (want, least) in ((inputs, shown), (targets, wanted)):
            assert count[row] == least[0]
            np.testing.assert_array_equal(got[row, : count[row]], want[0, : least[0]])


@pytest.mark.parametrize("share", [slice(None), slice(1, None, 3), slice(4, 30)])
def test_draws_of_some_rows_are_those_rows_of_all_draws(share):
    whole, mine = Draws(3, 5, 40), Draws(3, 5, 40, share)
    places = np.arange(40)[share]
    for tag in ("one", "two"):
        np.testing.assert_array_equal(mine.uniform(tag, 7), whole.uniform(tag, 7)[places])
    for chosen in ([], [0], [len(places) - 1], [4, 1], list(range(len(places)))):
        rows, part = np.array(chosen, int), np.arange(len(chosen))
        np.testing.assert_array_equal(mine.some("tag", 7, rows, part),
                                      whole.some("tag", 7, places[rows], part))


def test_draws_differ_by_seed_step_tag_row_attempt_and_place_and_are_uniform():
    rows = np.arange(50)
    found = [Draws(seed, step, 50).some(tag, 9, rows, rows * 0 + attempt)
             for seed in range(2) for step in range(2) for tag in "ab" for attempt in range(5)]
    drawn = np.concatenate(found).reshape(-1)
    assert len(np.unique(drawn)) > 0.99 * len(drawn)
    np.testing.assert_allclose(np.histogram(drawn, 10, (0, 1))[0] / len(drawn), 0.1, atol=0.01)
    doubles = Draws(0, 0, 4000).uniform("x", 4)
    np.testing.assert_allclose(np.corrcoef(doubles.T), np.eye(4), atol=0.08)


def test_picks_are_even_among_equal_concentrations_and_those_of_draws_among_others():
    alpha = np.tile([[0.5, 0.5, 0.0, 0.5], [2.0, 0.2, 0.2, 0.0]], (2000, 1))
    picks = Draws(0, 0, len(alpha)).picks("x", alpha)
    even, other = (np.bincount(picks[i::2].reshape(-1), minlength=4) / 8000 for i in range(2))
    np.testing.assert_allclose(even, [1 / 3, 1 / 3, 0, 1 / 3], atol=0.02)
    drawn = Draws(0, 1, len(alpha)).dirichlet("y", alpha, 4).argmax(-1)[1::2]
    np.testing.assert_allclose(other, np.bincount(drawn.reshape(-1), minlength=4) / 8000, atol=0.02)


def test_without_input_budget_everything_is_a_target():
    ids = np.array([[301, EOS_ID]])
    inputs, targets = fit_inputs(ids, np.array([2]), np.ones(1), np.array([0]),
                                 lambda *_: np.zeros((1, 2)))
    assert inputs[1].tolist() == [0]
    assert targets[0][0, :4].tolist() == [S1, 301, EOS_ID, S2]


@pytest.mark.parametrize(("choice", "budget", "kept"), [
    (0, 3, [S1, 301, S2]), (1, 3, [S2, 302, 303]), (9, 4, [S2, 302, 303, S3]),
    (1, 6, [S1, 301, S2, 302, 303, S3]), (1, 5, [S2, 302, 303, S3]), (0, 0, []),
])
def test_long_targets_start_at_a_sentinel(choice, budget, kept):
    ids = np.array([[S1, 301, S2, 302, 303, S3, 0]])
    got, length = cut_targets((ids, np.array([6])), np.array([budget]), np.array([choice]))
    assert got[0, : length[0]].tolist() == kept


def test_all_parts_of_a_text_that_is_too_long_are_predicted_alike():
    rows, words = 500, np.arange(210, 250)
    text = ModalitySpec(name="text", kind="seq", max_tokens=40, vocab_size=400)
    config = FourMConfig(modalities=(text,), dim=32, encoder_depth=1, decoder_depth=1, num_heads=1)
    whole = np.broadcast_to(words, (rows, 40)), np.full(rows, 40)
    part = Component(inputs={"text": 1.0}, targets={"text": 1.0}, num_inputs=(40, 40),
                     num_targets=(6, 6))
    batch = mask_batch(config, Samples(grids={}, sequences={"text": whole}),
                       Mixture(components=(part,)), Draws(0, 0, rows))
    found = batch.targets[batch.targets >= words[0]].numpy()
    quarters = np.bincount((found - words[0]) // 10, minlength=4)
    assert quarters.max() < 2 * quarters.min()


def test_a_component_with_larger_budgets_than_others_has_room_for_them():
    small, large = mixture(num_inputs=(4, 4), num_targets=(3, 3)), mixture()
    both = Mixture(components=(*small.components, *large.components))
    batch = mask_batch(CONFIG, samples(), both, Draws(0, 1, 6))
    assert (batch.enc_ids.shape, batch.dec_ids.shape) == ((6, 20), (6, 12))


def test_batches_are_static_and_full_where_grids_have_room():
    for step in range(20):
        batch = mask_batch(CONFIG, samples(), mixture(), Draws(0, step, 6))
        assert batch.enc_mod.shape == (6, 20)
        assert batch.dec_mod.shape == (6, 12)
        assert (batch.enc_mod >= 0).all()
        assert (batch.dec_mod >= 0).all()


def test_no_grid_position_is_both_seen_and_predicted_and_targets_are_true():
    batch = mask_batch(CONFIG, samples(), mixture(), Draws(1, 0, 6))
    flat = batch.dec_pos.reshape(-1)[batch.rows]
    first = 0
    for spec, count in zip(CONFIG.modalities, batch.counts, strict=True):
        if spec.kind == "img":
            assert torch.equal(batch.targets[first : first + count], flat[first : first + count])
        first += count
    for row in range(6):
        seen = set(zip(batch.enc_mod[row].tolist(), batch.enc_pos[row].tolist(), strict=True))
        aims = set(zip(batch.dec_mod[row].tolist(), batch.dec_pos[row].tolist(), strict=True))
        assert not {pair for pair in seen & aims if pair[0] != CONFIG.index("text")}


def test_pixels_go_to_the_slots_that_ask_for_them():
    data = samples()
    batch = mask_batch(CONFIG, data, mixture(), Draws(0, 0, 6))
    slots = batch.dense["rgb"].slots.numpy()
    assert (batch.enc_mod.numpy().reshape(-1)[slots] == CONFIG.index("rgb")).all()
    wanted = data.pixels["rgb"][slots // 20, batch.enc_pos.numpy().reshape(-1)[slots]]
    np.testing.assert_array_equal(batch.dense["rgb"].values.numpy(), wanted)


def test_grids_attend_their_modality_and_sequences_what_is_left():
    batch = mask_batch(CONFIG, samples(), mixture(), Draws(0, 3, 6))
    slots = torch.arange(12)
    for row in range(6):
        for i, (mod, until) in enumerate(zip(batch.dec_mod[row], batch.dec_until[row],
                                             strict=True)):
            last = int(slots[batch.dec_mod[row] == mod].max()) + 1
            assert int(until) == (i + 1 if CONFIG.modalities[mod].kind == "seq" else last)


def test_a_hole_gets_no_tokens():
    data = samples()
    data.present["depth"] = np.array([True, False] * 3)
    batch = mask_batch(CONFIG, data, mixture(), Draws(0, 0, 6))
    index = CONFIG.index("depth")
    assert not (batch.enc_mod[1::2] == index).any()
    assert not (batch.dec_mod[1::2] == index).any()


def test_a_component_names_all_that_is_visible():
    only = mixture(inputs={"rgb": 1.0}, num_inputs=(16, 16))
    batch = mask_batch(CONFIG, samples(), only, Draws(0, 0, 6))
    assert (batch.enc_mod == CONFIG.index("rgb")).all()


def test_one_component_for_a_whole_batch_fixes_its_shape():
    parts = mixture().components + mixture(num_inputs=(8, 8)).components
    mix = Mixture(components=parts, per_batch=True)
    widths = {mask_batch(CONFIG, samples(), mix, Draws(0, step, 6)).enc_mod.shape[1]
              for step in range(20)}
    assert widths == {8, 20}


def test_transfer_shows_all_of_one_and_asks_for_all_of_another():
    data = samples()
    batch = transfer_batch(CONFIG, data, ["rgb"], ["depth", "text"], Draws(0, 0, 6))
    assert (batch.enc_mod == CONFIG.index("rgb")).sum() == 6 * 16
    named = {m.name: c for m, c in zip(CONFIG.modalities, batch.counts, strict=True)}
    assert named["depth"] == 6 * 16
    assert named["text"] == int((data.sequences["text"][1] + 1).sum())


def test_small_concentrations_do_not_underflow():
    share = Draws(0, 0, 500).dirichlet("x", np.full((500, 4), 1e-3))
    assert np.isfinite(share).all()
    np.testing.assert_allclose(share.sum(1), 1)
    np.testing.assert_allclose(share.mean(0), 0.25, atol=0.08)


@pytest.mark.parametrize("field", ["num_inputs", "num_targets"])
def test_ranges_that_cannot_be_are_refused(field):
    with pytest.raises(ValueError, match=field):
        mixture(**{field: (5, 3)})


FACTS = FourMConfig(modalities=(
    ModalitySpec(name="facts", kind="seq", max_tokens=7, vocab_size=400, chunk=2),
    ModalitySpec(name="t5", kind="seq_emb", max_tokens=5, channels=3, is_target=False),
    ModalitySpec(name="depth", kind="img", max_tokens=16, vocab_size=99),
))
EVEN = {"facts": 1.0, "t5": 1.0, "depth": 1.0}


def facts(batch: int = 40) -> Samples:
    """Five facts of two tokens, (210 + i, 310 + i), and vectors whose values are their number."""
    ids = np.array([[t for i in range(5) for t in (210 + i, 310 + i)] + [EOS_ID]] * batch)
    length = np.arange(batch) % 6
    vectors = np.tile(np.arange(1, 6)[None, :, None], (batch, 1, 3)).astype(np.float16)
    return Samples(grids={"depth": np.zeros((batch, 16), np.int64)},
                   sequences={"facts": (ids, np.full(batch, 11))},
                   vectors={"t5": (vectors, length)})


def facts_batch(step: int = 0, **change):
    part = Component(**{"inputs": EVEN, "targets": {"facts": 1.0, "depth": 1.0},
                        "num_inputs": (12, 12), "num_targets": (9, 9), **change})
    return mask_batch(FACTS, facts(), Mixture(components=(part,)), Draws(0, step, 40))


def test_chunks_are_shown_or_predicted_whole_and_in_random_order():
    orders, index = set(), FACTS.index("facts")
    for step in range(5):
        batch = facts_batch(step)
        for row in range(40):
            shown = batch.enc_ids[row][batch.enc_mod[row] == index].tolist()
            fed = batch.dec_ids[row][batch.dec_mod[row] == index].tolist()
            firsts = [t for t in shown if 210 <= t < 220]
            assert all(shown[shown.index(t) + 1] == t + 100 for t in firsts)
            assert all(t - 100 in shown for t in shown if 310 <= t < 320)
            for at, t in enumerate(fed[:-1]):
                assert not 210 <= t < 220 or fed[at + 1] == t + 100
            assert not {*firsts} & {*fed}
            orders.add(tuple(firsts))
    assert len([order for order in orders if len(order) == 3]) > 6
    # Each chunk has a fate of its own.
    assert {len(order) for order in orders} >= {0, 1, 2, 3}


def test_chunks_that_do_not_fit_are_dropped_after_shuffling():
    ids, chunk = np.arange(9)[None], np.array([[0, 0, 0, 1, 1, 2, 2, 3, 9]])
    order = np.array([[2.0, 2, 2, 1, 1, 3, 3, 0, 9]])
    ids, chunk = shuffle_chunks(ids, np.array([8]), chunk, order)
    assert ids[0, :8].tolist() == [7, 3, 4, 0, 1, 2, 5, 6]
    lengths = [int(cut_chunks(np.array([8]), chunk, longest)[0]) for longest in range(9)]
    assert lengths == [0, 1, 1, 3, 3, 3, 6, 6, 8]


def test_metadata_without_a_place_in_the_input_is_predicted_whole_in_evaluation():
    batch = transfer_batch(FACTS, facts(), ["t5"], ["facts"], Draws(0, 0, 40))
    # 7 tokens hold three facts of two; [S_1] in front and [S_2] behind make 7 predictions.
    assert batch.counts[FACTS.index("facts")] == 40 * 7


def test_removed_runs_of_vectors_leave_one_zero_vector():
    keep = np.array([[0, 1, 1, 0, 1]] * 2)
    source, visible = fit_vectors(np.array([5, 4]), 5, np.ones(2), np.array([9, 9]),
                                  lambda *_: keep.astype(float))
    assert source[0, : visible[0]].tolist() == [0, -1, 3, -1]
    assert source[1, : visible[1]].tolist() == [0, -1, 3]


def test_vectors_reach_the_slots_that_ask_for_them():
    batch = transfer_batch(FACTS, facts(), ["t5"], ["depth"], Draws(0, 0, 40))
    dense, index = batch.dense["t5"], FACTS.index("t5")
    assert dense.values.dtype == torch.float32
    slots = dense.slots.tolist()
    assert (batch.enc_mod.reshape(-1)[slots] == index).all()
    assert torch.equal(dense.values[:, 0].long() - 1, batch.enc_pos.reshape(-1)[slots])
    assert (batch.enc_mod == index).sum(1).tolist() == (np.arange(40) % 6).tolist()
    masked = facts_batch().dense["t5"].values
    assert (masked == 0).all(1).any()


def test_keep_binary_shows_all_or_nothing():
    ids = facts_batch(keep="binary", inputs={"facts": 1.0}, num_inputs=(7, 7)).enc_ids
    shown = (ids >= 210).sum(1).unique().tolist()
    assert shown == [0, 6]


def test_without_spilling_excess_is_lost_as_in_released_training():
    full, lost = (facts_batch(inputs={"t5": 1.0, "depth": 1.0}, spill=spill).enc_mod >= 0
                  for spill in (True, False))
    assert full.all()
    assert not lost.all()


def test_a_modality_gets_the_least_it_must():
    index = FACTS.index("depth")
    asked = {"inputs": {"depth": 0.3, "t5": 0.3}, "spill": False}
    batch = facts_batch(least={"depth": 3}, **asked)
    assert int((batch.enc_mod == index).sum(1).min()) >= 3
    free = facts_batch(**asked)
    assert int((free.enc_mod == index).sum(1).min()) < 3


@given(st.lists(st.booleans(), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_merging_spans_undoes_masking(keep):
    ids = np.arange(300, 300 + len(keep))[None]
    inputs, targets = span_mask(ids, np.array([len(keep)]), np.array([keep]))
    merged = merge_spans(*(part[0, : n[0]].tolist() for part, n in (inputs, targets)))
    assert merged == ids[0].tolist()


def test_an_unknown_way_to_keep_is_refused():
    with pytest.raises(ValueError, match="keep must be random, all or binary, got 'some'"):
        facts_batch(keep="some")
