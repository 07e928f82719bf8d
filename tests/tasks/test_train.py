"""Contracts of 4M training on a tiny published set."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

from models.fourm.batch import Batch
from models.fourm.checkpoint import load_stored
from models.fourm.masking import Component, Mixture
from tasks.recipes import RECIPES, TrainRecipe, recipe
from tasks.train import FourMTask, train_fourm
from tasks.trainer import TrainConfig, Trainer
from tests.models.token_set import make_set

TINY = TrainRecipe(
    network={"dim": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2},
    mixture=Mixture(components=(
        Component(inputs={"rgb": 1.0}, targets={"*": 1.0}, num_inputs=(4, 4), num_targets=(8, 8)),
        Component(inputs={"*": 1.0}, targets={"*": 1.0}, num_inputs=(8, 8), num_targets=(8, 8)),
    ), per_batch=True),
    training=TrainConfig(steps=4, batch_size=8, lr=1e-3, warmup_steps=1, precision="fp32",
                         log_every=1),
    max_text=12, muon=True, val_samples=6,
)


@pytest.fixture(scope="module")
def token_set(tmp_path_factory):
    return make_set(str(tmp_path_factory.mktemp("set")))


def test_a_run_ends_with_a_loadable_model_and_losses_of_every_target(token_set):
    store, manifest = token_set
    info = train_fourm(store, manifest, TINY, run="first")
    expected = {"val/rgb->caption", "val/rgb->tok_depth", "val/rgb->tok_rgb"}
    assert expected <= info.metrics.keys()
    model = load_stored(store, "runs/first/model")
    task = FourMTask(store, manifest, TINY)
    with torch.no_grad():
        found = task.evaluate(model)["val/rgb->caption"]
    assert found == pytest.approx(
        info.metrics["val/rgb->caption"], abs=1e-5)
    steps: list[int] = []
    again = train_fourm(store, manifest, TINY, run="first",
                        on_progress=lambda step, *_: steps.append(step))
    assert (again, steps) == (info, [])


def test_losses_are_of_the_samples_that_have_the_target(token_set, monkeypatch):
    task = FourMTask(*token_set, TINY)
    model = task.build_model()
    with torch.no_grad():
        wanted = task.evaluate(model)
        monkeypatch.setattr("tasks.train._VAL_BATCH", 1)  # the fourth sample has no depth
        task = FourMTask(*token_set, TINY)
        assert task.evaluate(model) == pytest.approx(wanted, abs=1e-5)
        task.validation[:] = [one for one in task.validation if not sum(one[1].counts)]
        assert len(task.validation) == 1
        assert task.evaluate(model) == {}


def test_a_run_of_other_settings_needs_another_name(token_set):
    store, manifest = token_set
    train_fourm(store, manifest, TINY, run="taken")
    other = dataclasses.replace(TINY, max_text=10)
    with pytest.raises(ValueError, match="choose another run name"):
        train_fourm(store, manifest, other, run="taken")


class Stopping(FourMTask):
    """Ends like a killed process."""

    def batch(self, step: int, rank: int, world: int) -> Batch:
        if step == 3:
            raise KeyError("killed")
        return super().batch(step, rank, world)


def test_a_run_that_was_cut_off_goes_on_with_its_own_data_and_masks_only(token_set):
    store, manifest = token_set
    often = dataclasses.replace(TINY.training, checkpoint_seconds=0.0)
    recipe = dataclasses.replace(TINY, training=often)
    with pytest.raises(KeyError, match="killed"):
        Trainer(store, "runs/cut", Stopping(store, manifest, recipe), often).fit()
    grown = dataclasses.replace(manifest, version=manifest.version + 1)
    with pytest.raises(ValueError, match=r"started with another manifest: \['set', 1\], now"):
        train_fourm(store, grown, recipe, run="cut")
    other = dataclasses.replace(recipe, mixture=dataclasses.replace(TINY.mixture, per_batch=False))
    with pytest.raises(ValueError, match="another recipe, mixture, per_batch: True, now False"):
        train_fourm(store, manifest, other, run="cut")
    assert train_fourm(store, manifest, recipe, run="cut").steps == 4


def test_two_workers_mask_the_batch_that_one_masks(token_set):
    task = FourMTask(*token_set, TINY)
    for step in range(4):
        whole = task.batch(step, 0, 1)
        for rank, part in enumerate([task.batch(step, rank, 2) for rank in range(2)]):
            assert torch.equal(part.enc_ids, whole.enc_ids[rank::2])
            assert torch.equal(part.dec_pos, whole.dec_pos[rank::2])


def test_the_task_travels_to_workers(token_set):
    task = FourMTask(*token_set, TINY)
    before = task.batch(1, 0, 1)
    after = pickle.loads(pickle.dumps(task)).batch(1, 0, 1)
    assert torch.equal(before.targets, after.targets)


def test_budgets_that_no_batch_can_hold_are_refused(token_set):
    wide = dataclasses.replace(TINY.mixture.components[0], num_inputs=(5, 5))
    with pytest.raises(ValueError, match="no batch can hold 5 input tokens of rgb@32"):
        FourMTask(*token_set, dataclasses.replace(TINY, mixture=Mixture(components=(wide,))))


@pytest.mark.parametrize(("changes", "said"), [
    # A place that is shown is not there to be predicted.
    ({"inputs": {"tok_rgb": 1.0}, "num_inputs": (3, 4), "num_targets": (2, 2)},
     "2 target tokens of tok_rgb@32 beside 3 input tokens of tok_rgb@32: 1 are left"),
    ({"inputs": {"rgb": 1.0, "tok_rgb": 1.0}, "num_inputs": (6, 6), "num_targets": (3, 4)},
     "3 target tokens of tok_rgb@32 beside 6 input tokens of rgb@32, tok_rgb@32: 2 are left"),
    ({"num_inputs": (4, 4), "least": {"rgb": 5}}, "5 input tokens of rgb@32: it has 4"),
    ({"inputs": {"*": 1.0}, "num_inputs": (4, 6), "least": {"*": 2}},
     ": 8 input tokens of at most 6"),
    ({"least": {"caption": 1}}, "the mixture names caption; choose from rgb or"),
])
def test_shares_that_no_batch_can_have_are_refused(token_set, changes, said):
    part = dataclasses.replace(TINY.mixture.components[0], targets={"tok_rgb": 1.0},
                               num_targets=(1, 4))
    odd = Mixture(components=(dataclasses.replace(part, **changes),))
    with pytest.raises(ValueError, match=said):
        FourMTask(*token_set, dataclasses.replace(TINY, mixture=odd))


def test_shown_places_are_taken_from_other_modalities_and_texts_first(token_set):
    fits = Component(inputs={"rgb": 1.0, "tok_rgb": 1.0}, targets={"tok_rgb": 1.0},
                     num_inputs=(6, 6), num_targets=(2, 2))
    texts = Component(inputs={"caption": 1.0}, targets={"caption": 1.0}, num_inputs=(9, 9),
                      num_targets=(9, 9))
    FourMTask(*token_set, dataclasses.replace(TINY, mixture=Mixture(components=(fits, texts))))


def test_unknown_modalities_and_recipes_list_the_choices(token_set):
    odd = dataclasses.replace(TINY.mixture.components[0], inputs={"smell": 1.0})
    with pytest.raises(ValueError, match="the mixture names smell; choose from caption, rgb"):
        FourMTask(*token_set, dataclasses.replace(TINY, mixture=Mixture(components=(odd,))))
    with pytest.raises(ValueError, match="unknown recipe 'giant'; choose from demo"):
        recipe("giant")


@pytest.mark.parametrize("held", [("tok_depth",), ("tok_rgb", "tok_depth", "caption")])
def test_the_recipe_any_trains_on_whatever_labels_a_set_has(held, tmp_path):
    data = make_set(str(tmp_path), held=("rgb", *held), grid=8)
    with pytest.raises(ValueError, match="the recipe 'any' takes what there is"):
        FourMTask(*data, recipe("demo"))
    task = FourMTask(*data, recipe("any", batch_size=4))
    assert {spec.name.split("@")[0] for spec in task.config.targets} == set(held)
    assert sum(task.batch(0, 0, 1).counts) > 0


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_take_other_numbers(name):
    changed = recipe(name, steps=50, batch_size=4, seed=3).training
    assert (changed.steps, changed.batch_size, changed.seed) == (50, 4, 3)
    assert changed.warmup_steps <= 5
