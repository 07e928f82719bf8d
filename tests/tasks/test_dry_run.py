"""Contracts of the plan of a training: right sizes, seconds, refusals with names and numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from models.fourm.masking import Component, Mixture
from tasks.dry_run import GIB, Machines, meta_model, plan_lines, plan_training
from tasks.mixture import bind
from tasks.recipes import RECIPES, recipe
from tasks.train import FourMTask
from tests.models.token_set import make_set
from tests.tasks.test_train import TINY

CORE = {"_b": 198.8e6, "_l": 705e6, "_xl": 2.8e9}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_plan_whose_network_has_its_published_size(name):
    plan = plan_training(recipe(name), Machines())
    for size, published in CORE.items():
        if name.endswith(size):
            assert plan.core == pytest.approx(published, rel=0.01)
    assert plan.core < plan.parameters == plan.trained
    assert any("without embeddings" in line for line in plan_lines(plan))


def test_the_base_model_has_the_measured_number_of_parameters():
    plan = plan_training(recipe("fourm_b"), Machines())
    assert plan.parameters == pytest.approx(360.8e6, rel=1e-3)
    assert plan.tokens == pytest.approx(500e9, rel=1e-4)


def test_sharding_divides_what_it_should_and_recomputing_shrinks_activations():
    chosen = recipe("fourm_xl")
    whole = plan_training(chosen, Machines(devices=128)).memory
    split = plan_training(chosen, Machines(devices=128, parallel="fsdp")).memory
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(split, part) == pytest.approx(getattr(whole, part) / 128)
    assert whole.optimizer == 2 * whole.weights
    assert (whole.mean, split.mean) == (0, 0)
    averaged = recipe("fourm_xl", ema=0.9999)
    assert plan_training(averaged, Machines()).memory.mean == whole.weights
    # The largest block twice in bf16 with its gradients, all embeddings in fp32 with theirs.
    sizes = {name: math.prod(shape) for name, shape in plan_training(chosen, Machines())
             .tensors.items()}
    block = sum(size for name, size in sizes.items() if name.startswith("decoder.0."))
    outside = sum(size for name, size in sizes.items()
                  if not name.startswith(("encoder.", "decoder.")))
    assert (whole.gathered, split.gathered) == (0, 8 * block + 8 * outside)
    again = Machines(devices=128, parallel="fsdp", recompute=True)
    assert plan_training(chosen, again).memory.activations < split.activations / 4
    halves = Machines(devices=128, parallel="fsdp", accumulate=2)
    assert plan_training(chosen, halves).memory.activations == pytest.approx(split.activations / 2)


def test_hours_are_operations_over_pace():
    plan = plan_training(recipe("fourm_b"), Machines(devices=64, peak_tflops=100, mfu=0.5))
    assert plan.hours == pytest.approx(plan.flops / (64 * 100e12 * 0.5) / 3600)
    assert plan.memory.total == sum(vars(plan.memory).values()) > GIB


def test_low_rank_updates_leave_blocks_untrained():
    plan = plan_training(recipe("fourm_b", lora=16), Machines())
    assert plan.trained < plan.parameters - 150e6
    full = plan_training(recipe("fourm_b"), Machines())
    assert full.parameters < plan.parameters < full.parameters + 20e6
    frozen = plan_training(recipe("fourm_b", freeze=["encoder.*"]), Machines())
    assert frozen.memory.gradients < full.memory.gradients


def test_a_manifest_is_checked_by_its_own_modalities(tmp_path):
    store, manifest = make_set(str(tmp_path))
    plan = plan_training(TINY, Machines(), bind(TINY, {"main": [(store, manifest)]}))
    task = FourMTask(store, manifest, TINY)
    assert plan.config == task.config
    assert plan.parameters == sum(p.numel() for p in task.build_model().parameters())


def test_what_cannot_be_trained_is_refused_with_names_and_numbers(tmp_path):
    store, manifest = make_set(str(tmp_path))
    with pytest.raises(ValueError, match=r"set v1 lacks det, tok_clip, .*; it has caption, rgb@32"):
        bind(recipe("fourm_b"), {"main": [(store, manifest)]})
    wide = Component(inputs={"rgb": 1.0}, targets={"*": 1.0}, num_inputs=(200, 200),
                     num_targets=(8, 8))
    chosen = replace(recipe("fourm_b"), mixture=Mixture(components=(wide,)))
    with pytest.raises(ValueError, match="no batch can hold 200 input tokens of rgb@224: "
                                         "together they have 196"):
        plan_training(chosen, Machines())
    with pytest.raises(ValueError, match="batch_size 8192 is no multiple of 3 devices"):
        plan_training(recipe("fourm_b"), Machines(devices=3))
    with pytest.raises(ValueError, match="no multiple of 64 devices x 3 accumulated parts"):
        plan_training(recipe("fourm_b"), Machines(devices=64, accumulate=3))
    with pytest.raises(ValueError, match=r"share of the peak in \(0, 1\], got 2"):
        Machines(mfu=2)
    with pytest.raises(ValueError, match="parallel must be ddp or fsdp, got 'zero'"):
        Machines(parallel="zero")


def test_nothing_is_allocated():
    model = meta_model(plan_training(recipe("demo"), Machines()).config)
    assert all(p.is_meta for p in model.parameters())
