"""Contracts of recipes: what they hold, and that a run keeps its name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.recipes import RECIPES, Lora, Phase, Source, described, recipe

RELEASED = sorted(set(RECIPES) - {"demo", "demo_12", "any", "speedrun"})
TOKENS = {"fourm": 500e9, "t2i": 100e9, "sr": 100e9}


def slots(chosen):
    most = max(chosen.mixture.components, key=lambda part: part.num_inputs[1])
    return most.num_inputs[1] + most.num_targets[1]


@pytest.mark.parametrize("name", RELEASED)
def test_released_recipes_spend_their_published_tokens(name):
    chosen = recipe(name)
    training = chosen.training
    spent = training.steps * training.batch_size * slots(chosen)
    assert spent == pytest.approx(TOKENS[name.split("_")[0]], rel=1e-4)
    assert 0.015 < training.warmup_steps / training.steps < 0.11


def test_learning_rates_are_the_published_ones():
    rates = {name: recipe(name).training.lr for name in RELEASED}
    assert rates["fourm_b"] == rates["fourm_21_l"] == rates["t2i_l"] == pytest.approx(3.2e-3)
    assert rates["t2i_b"] == rates["sr_l"] == pytest.approx(1.6e-3)
    assert rates["fourm_xl"] == pytest.approx(6.4e-4)
    assert rates["t2i_xl"] == pytest.approx(3.2e-4)


@pytest.mark.parametrize("name", RELEASED)
def test_recipes_that_begin_with_another_name_one_of_the_same_network(name):
    chosen = recipe(name)
    assert bool(chosen.starts_from) == (name not in ("fourm_b", "fourm_l", "fourm_xl"))
    if chosen.starts_from:
        assert recipe(chosen.starts_from).network == chosen.network


@pytest.mark.parametrize("name", RELEASED)
def test_released_recipes_state_cost_score_and_command(name):
    said = RECIPES[name].__doc__ or ""
    assert "Cost:" in said
    assert "Score" in said
    assert "Command:" in said


def test_a_mean_of_the_weights_is_asked_for_by_its_decay_and_makes_another_run():
    training = recipe("demo", ema=0.999).training
    assert (training.ema_decay, training.finish_with_ema) == (0.999, True)
    assert described(recipe("demo", ema=0.999)) != described(recipe("demo"))


def test_a_run_of_the_demo_keeps_the_name_it_had_before_recipes_grew():
    digest = hashlib.sha256(json.dumps(described(recipe("demo")), sort_keys=True).encode())
    assert digest.hexdigest()[:12] == "3470b2401c63"


def test_twelve_modalities_cost_those_of_4m_7_no_batch():
    seven, twelve = (recipe(name) for name in ("demo", "demo_12"))
    shares = []
    for chosen in (seven, twelve):
        parts = chosen.mixture.components
        share = parts[0].weight / sum(part.weight for part in parts)
        shares.append(share * chosen.training.steps)
    assert twelve.mixture.components[0] == seven.mixture.components[0]
    assert twelve.network == seven.network
    assert shares[1] > 0.9 * shares[0]


def test_on_how_much_hardware_a_run_is_computed_does_not_rename_it():
    plain = recipe("demo")
    spread = replace(plain.training, accumulate=2, parallel="fsdp", compile=True)
    assert described(replace(plain, training=spread)) == described(plain)


def test_settings_that_came_later_count_where_they_are_used():
    chosen = recipe("demo")
    assert "repeats" not in described(chosen)
    assert described(replace(chosen, repeats=4))["repeats"] == 4
    lora = described(replace(chosen, lora=Lora(rank=4)))
    assert lora != described(chosen)
    assert json.loads(json.dumps(lora)) == lora


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(RECIPES)), st.integers(1, 10_000), st.integers(0, 9))
def test_descriptions_differ_exactly_where_recipes_do(name, steps, seed):
    one, other = recipe(name, steps=steps, seed=seed), recipe(name, steps=steps, seed=seed)
    assert described(one) == described(other)
    assert described(one) != described(recipe(name, steps=steps + 1, seed=seed))


def test_curricula_are_checked_with_names_and_numbers():
    chosen = recipe("demo")
    with pytest.raises(ValueError, match=r"share of the run in \[0, 1\), got 1.5"):
        Phase(since=1.5)
    with pytest.raises(ValueError, match="names coyo; the sources are main"):
        replace(chosen, phases=(Phase(since=0.5, sources={"coyo": 1.0}),))
    with pytest.raises(ValueError, match="2 weights for the 4 components of main"):
        replace(chosen, phases=(Phase(since=0.5, components={"main": (1, 0)}),))
    with pytest.raises(ValueError, match="in the order of time"):
        replace(chosen, phases=(Phase(since=0.5), Phase(since=0.2)))
    with pytest.raises(ValueError, match="nor all 0"):
        Phase(since=0.5, components={"main": (0, 0)})
    with pytest.raises(ValueError, match="source a: weight must be positive, got 0"):
        Source(name="a", weight=0, mixture=chosen.mixture)
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        replace(chosen, repeats=0)


def test_a_phase_that_begins_after_the_tokens_are_spent_is_refused():
    chosen = recipe("demo", steps=1000)
    least = min(part.num_inputs[1] + part.num_targets[1] for part in chosen.mixture.components)
    tokens = 500 * least * chosen.training.batch_size
    counted = replace(chosen, training=replace(chosen.training, tokens=tokens))
    assert replace(counted, phases=(Phase(since=0.49),)).phases
    assert replace(chosen, phases=(Phase(since=0.99),)).phases
    with pytest.raises(ValueError, match=f"0.5 of 1000 steps never begins: {tokens} tokens are "
                                         "spent after 500 steps"):
        replace(counted, phases=(Phase(since=0.5),))


def test_fine_tuning_is_a_matter_of_settings():
    chosen = recipe("fourm_b", start="first", freeze=["encoder.*"], lora=8)
    assert (chosen.start, chosen.freeze) == ("first", ("encoder.*",))
    assert chosen.lora == Lora(rank=8, alpha=16.0)
