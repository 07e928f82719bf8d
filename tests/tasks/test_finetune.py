"""Contracts of fine-tuning: what is taken over, what stays, what is refused."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from models.fourm.checkpoint import load_stored, save_released, to_released
from models.fourm.masking import Component, Mixture
from models.fourm.model import FourM
from models.fourm.spec import FourMConfig, ModalitySpec
from tasks.finetune import finished, graft, modality_of, tune
from tasks.recipes import Lora
from tasks.train import FourMTask, train_fourm
from tests.models.token_set import make_set
from tests.tasks.test_train import TINY

MASKS = Mixture(components=(
    Component(inputs={"*": 1.0}, targets={"*": 1.0}, num_inputs=(4, 8), num_targets=(8, 8)),
))
BASE = dataclasses.replace(TINY, mixture=MASKS, muon=False,
                           modalities=("rgb", "tok_rgb", "caption"))
MORE = dataclasses.replace(BASE, modalities=(), start="base")
OLD = ("caption", "rgb@32", "tok_rgb@32")


@pytest.fixture(scope="module")
def token_set(tmp_path_factory):
    store, manifest = make_set(str(tmp_path_factory.mktemp("set")))
    train_fourm(store, manifest, BASE, run="base")
    return store, manifest


def released(model):
    return {name: value.detach().clone() for name, value in to_released(model).items()}


def test_names_say_whose_they_are():
    assert modality_of("encoder_embeddings.tok_rgb@32.token_emb.weight") == "tok_rgb@32"
    assert modality_of("decoder_embeddings.caption.mod_emb") == "caption"
    assert modality_of("encoder.0.attn.proj.weight") == ""


def test_old_tensors_are_taken_over_and_new_modalities_begin_fresh(token_set):
    store, _ = token_set
    before = released(load_stored(store, "runs/base/model"))
    after = released(FourMTask(*token_set, MORE).build_model())
    assert before.keys() < after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    new = after["decoder_embeddings.tok_depth@32.to_logits.weight"]
    assert new.std() > 0


def test_a_fine_tuned_model_has_the_new_modality_and_is_found_again(token_set):
    store, manifest = token_set
    info = train_fourm(store, manifest, MORE, run="more")
    assert "val/rgb->tok_depth" in info.metrics
    model = load_stored(store, "runs/more/model")
    assert "tok_depth@32" in model.config.by_name
    assert train_fourm(store, manifest, MORE, run="more") == info


def test_frozen_tensors_stay_bit_for_bit_while_others_learn(token_set):
    store, manifest = token_set
    patterns = ("encoder.*", "*.caption.*", "*_embeddings.tok_rgb@32.*")
    frozen = dataclasses.replace(MORE, freeze=patterns)
    train_fourm(store, manifest, frozen, run="frozen")
    before = released(load_stored(store, "runs/base/model"))
    after = released(load_stored(store, "runs/frozen/model"))
    for name, value in before.items():
        stays = name.startswith("encoder.") or modality_of(name) in ("caption", "tok_rgb@32")
        if stays:
            assert torch.equal(after[name], value), name
    moved = "decoder.0.mlp.fc1.weight"
    assert not torch.equal(after[moved], before[moved])


def test_checkpoints_come_from_folders_too(token_set, tmp_path):
    store, manifest = token_set
    save_released(load_stored(store, "runs/base/model"), tmp_path)
    there = dataclasses.replace(MORE, start=str(tmp_path))
    FourMTask(store, manifest, there).check_start()


def test_a_start_that_does_not_exist_is_refused_with_the_choices(token_set):
    odd = dataclasses.replace(MORE, start="nowhere")
    with pytest.raises(ValueError, match=r"cannot begin with 'nowhere'.*there are: base"):
        FourMTask(*token_set, odd).check_start()


def test_a_recipe_that_needs_a_start_asks_for_it(token_set):
    store, manifest = token_set
    needy = dataclasses.replace(BASE, starts_from="fourm_b")
    with pytest.raises(ValueError, match="begins with a model of fourm_b: say which with --start"):
        train_fourm(store, manifest, needy, run="needy")
    assert not store.exists("runs/needy/curve.jsonl")
    FourMTask(store, manifest, dataclasses.replace(needy, start="none")).build_model()
    low = dataclasses.replace(BASE, lora=Lora(rank=2))
    with pytest.raises(ValueError, match="change a trained model: say which with --start"):
        train_fourm(store, manifest, low, run="low")


def test_another_network_is_refused_by_its_settings(token_set):
    wider = dataclasses.replace(MORE, network={**TINY.network, "dim": 32})
    with pytest.raises(ValueError, match="another network: its dim is 16, the recipe's 32"):
        train_fourm(*token_set, wider, run="wider")


def test_misshapen_and_missing_tensors_are_all_named():
    def network(vocab, **extra):
        specs = (
            ModalitySpec(name="a@32", kind="img", max_tokens=4, vocab_size=vocab),
            ModalitySpec(name="b", kind="seq", max_tokens=8, vocab_size=30, **extra),
        )
        return FourM(FourMConfig(modalities=specs, dim=16, encoder_depth=1, decoder_depth=1,
                                 num_heads=2))

    with torch.device("meta"):
        wanted = network(9)
    with pytest.raises(ValueError, match="checkpoint does not fit") as refused:
        graft(wanted, network(8, is_target=False))
    said = str(refused.value)
    assert r"encoder_embeddings.a@32.token_emb.weight has shape (8, 16), the recipe asks for " \
        "(9, 16)" in said
    assert "decoder_embeddings.b.to_logits.weight is missing" in said


def test_new_modalities_inherit_vectors_of_the_same_codes():
    def network(*names):
        specs = tuple(ModalitySpec(name=name, kind="img", max_tokens=4 * (i + 1) ** 2,
                                   vocab_size=8) for i, name in enumerate(names))
        return FourM(FourMConfig(modalities=specs, dim=16, encoder_depth=1, decoder_depth=1,
                                 num_heads=2))

    old, new = network("a@32"), network("a@32", "a@64")
    assert graft(new, old, {"a@64": "a@32"}) == ("a@64",)
    names = ("encoder_embeddings.{}.token_emb.weight", "decoder_embeddings.{}.to_logits.weight",
             "encoder_embeddings.{}.mod_emb")
    for name in names:
        assert torch.equal(released(new)[name.format("a@64")], released(old)[name.format("a@32")])
    with pytest.raises(ValueError, match="cannot inherit from c@32: the checkpoint has a@32"):
        graft(network("a@32", "a@64"), old, {"a@64": "c@32"})


def test_patterns_that_match_nothing_or_everything_are_refused(token_set):
    odd = dataclasses.replace(MORE, freeze=("encodr.*",))
    with pytest.raises(ValueError, match=r"'encodr.\*' names no tensor; names begin with decoder"):
        FourMTask(*token_set, odd).check_start()
    with pytest.raises(ValueError, match="leaves nothing to train"):
        FourMTask(*token_set, dataclasses.replace(MORE, freeze=("*",))).check_start()


def test_low_rank_training_without_peft_names_the_extra_before_it_starts(token_set, monkeypatch):
    store, manifest = token_set
    monkeypatch.setitem(sys.modules, "peft", None)
    low = dataclasses.replace(MORE, lora=Lora(rank=2))
    with pytest.raises(ValueError, match=r"pip install 'fourm\[lora\]'"):
        train_fourm(store, manifest, low, run="without")
    assert not store.list("runs/without")


def test_low_rank_updates_are_trained_alone_and_stored_merged(token_set):
    store, manifest = token_set
    low = dataclasses.replace(MORE, lora=Lora(rank=2), training=dataclasses.replace(
        MORE.training, lr=0.05))
    train_fourm(store, manifest, low, run="low")
    before = released(load_stored(store, "runs/base/model"))
    after = released(load_stored(store, "runs/low/model"))
    assert before.keys() < after.keys()
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed
    assert all(name.startswith(("encoder.", "decoder.")) for name in changed)
    difference = (after["encoder.0.mlp.fc1.weight"] - before["encoder.0.mlp.fc1.weight"]).double()
    assert torch.linalg.matrix_rank(difference, rtol=1e-4) <= 2


def test_merging_changes_no_prediction(token_set):
    task = FourMTask(*token_set, dataclasses.replace(MORE, lora=Lora(rank=2)))
    torch.manual_seed(0)
    model = task.build_model().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        batch = task.batch(0, 0, 1)
        apart, merged = model(batch).total, finished(model)(batch).total
    assert merged == pytest.approx(float(apart), abs=1e-5)
    assert "encoder.0.attn.qkv.weight" in dict(model.named_parameters())


def test_a_fresh_model_is_tuned_in_place():
    specs = (ModalitySpec(name="a@32", kind="img", max_tokens=4, vocab_size=8),)
    model = FourM(FourMConfig(modalities=specs, dim=16, encoder_depth=1, decoder_depth=1,
                              num_heads=2))
    assert tune(model, TINY, ()) is model
    assert all(parameter.requires_grad for parameter in model.parameters())
