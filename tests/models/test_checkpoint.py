"""Contracts of released checkpoints: what opens, what is refused with which words, the hub."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load, save

from models import fourm
from models.fourm import checkpoint
from models.fourm.batch import from_released
from models.fourm.model import FourM
from models.fourm.spec import FourMConfig, ModalitySpec
from tests.models.tiny import CONFIG, make, released

UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)


def loss(model) -> torch.Tensor:
    return model(from_released(released(), model.config, 10, 8)).total


def rebuilt(tensors, config: dict | None = None, contents=None) -> FourM:
    """A model of altered files, without our own description of its modalities."""
    contents = contents or checkpoint.files(make())
    stored = {**json.loads(contents["config.json"]), **(config or {})}
    files = {"config.json": json.dumps(stored).encode(), "model.safetensors": save(tensors)}
    return checkpoint.build(files, {"caption": (6, 6)})


def tensors_of(model=None) -> dict[str, torch.Tensor]:
    return load(checkpoint.files(model or make())["model.safetensors"])


@pytest.mark.parametrize("change", [
    {}, {"tie_embeddings": False, "share_modality_embeddings": False},
    {"qk_norm": True, "num_register_tokens": 2}, {"bias": True, "gated_mlp": False},
])
def test_checkpoints_round_trip(tmp_path, change):
    config = dataclasses.replace(CONFIG, **change)
    model = make(config, seed=1)
    fourm.save_released(model, tmp_path)
    again = fourm.load(tmp_path)
    assert again.config == config
    assert torch.equal(loss(model), loss(again))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(checkpoint.FILES)


def test_a_released_folder_loads_without_our_file_and_with_shared_vectors_stored_once():
    tensors = tensors_of()
    assert tensors["encoder_embeddings.caption.pos_emb"].shape == (1, 512, 16)
    assert not tensors["encoder.0.norm1.bias"].any()
    del tensors["encoder_embeddings.caption.mod_emb"]
    model = rebuilt(tensors)
    assert torch.equal(loss(model), loss(make()))
    assert model.config.by_name["vector"].learned_positions


@pytest.mark.parametrize("kept", ["token_emb", "to_logits"])
def test_a_tied_matrix_may_be_stored_under_either_of_its_names(kept):
    other = {"token_emb": "to_logits", "to_logits": "token_emb"}[kept]
    tensors = {name: value for name, value in tensors_of().items()
               if not (name.startswith("decoder_embeddings") and f".{other}." in name)}
    model = rebuilt(tensors)
    assert model.config.tie_embeddings
    assert torch.equal(loss(model), loss(make()))


def test_shapes_come_from_the_file():
    specs = (
        ModalitySpec(name="ir@30", kind="pixels", max_tokens=25, patch_size=6, channels=1,
                     is_target=False),
        ModalitySpec(name="rgb@30", kind="pixels", max_tokens=9, patch_size=10, is_target=False),
        ModalitySpec(name="tok_odd", kind="img", max_tokens=7, vocab_size=31,
                     learned_positions=True),
        ModalitySpec(name="long", kind="img", max_tokens=512, vocab_size=5,
                     learned_positions=True),
        ModalitySpec(name="t5_caption", kind="seq_emb", max_tokens=77, channels=10,
                     is_target=False),
        ModalitySpec(name="metadata", kind="seq", max_tokens=40, max_length=40, vocab_size=53,
                     chunk=2),
    )
    config = FourMConfig(modalities=specs, dim=20, encoder_depth=1, decoder_depth=1, num_heads=5,
                         mlp_ratio=1.7)
    contents = checkpoint.files(make(config))
    model = rebuilt(load(contents["model.safetensors"]), {"patch_size": 6}, contents)
    assert model.config == config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_another_precision_load_as_fp32_of_the_same_modalities(dtype):
    tensors = {name: value.to(dtype) for name, value in tensors_of().items()}
    model, same = rebuilt(tensors), rebuilt(tensors_of())
    assert model.config == same.config
    for own, wanted in zip(model.parameters(), same.parameters(), strict=True):
        assert own.dtype == torch.float32
        assert torch.equal(own, wanted.to(dtype).float())


def test_tensors_of_integers_are_refused_by_name():
    tensors = tensors_of()
    tensors["encoder.0.attn.qkv.weight"] = torch.zeros(48, 16, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"qkv.weight \[48, 16\] of torch.int8, not of floats"):
        rebuilt(tensors)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_cut_short_is_refused_by_its_name(tmp_path, name):
    fourm.save_released(make(), tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        fourm.load(tmp_path)


def test_missing_surplus_and_misshapen_tensors_are_named_with_their_shapes_at_once():
    tensors = tensors_of()
    for name in ("decoder.1.norm2.weight", "mask_token"):
        del tensors[name]
    tensors["encoder.7.norm1.weight"] = torch.zeros(16)
    tensors["encoder.0.attn.qkv.weight"] = torch.zeros(48, 15)
    tensors["decoder_embeddings.tok_rgb@32.token_emb.weight"] = torch.zeros(12, 16)
    with pytest.raises(ValueError, match="do not fit the configuration") as caught:
        rebuilt(tensors)
    text = str(caught.value)
    assert "2 missing: decoder.1.norm2.weight [16], mask_token [1, 1, 16]" in text
    assert "1 surplus: encoder.7.norm1.weight [16]" in text
    assert "2 misshapen: decoder_embeddings.tok_rgb@32.token_emb.weight [12, 16], not [13, 16]" \
        in text
    assert "encoder.0.attn.qkv.weight [48, 15], not [48, 16]" in text


def test_many_of_a_kind_are_counted():
    tensors = {name: value for name, value in tensors_of().items()
               if not name.startswith("decoder.1.")}
    with pytest.raises(ValueError, match=r"12 missing: decoder\.1\.context_norm.* and 6 more"):
        rebuilt(tensors)


def test_modalities_without_what_tells_their_shape_are_named_beside_other_faults():
    tensors = tensors_of()
    del tensors["encoder_embeddings.caption.pos_emb"]
    del tensors["encoder_embeddings.rgb@32.proj.weight"]
    del tensors["mask_token"]
    tensors["encoder_embeddings.vector.pos_emb"] = torch.zeros(2, 16)
    with pytest.raises(ValueError, match="3 missing") as caught:
        rebuilt(tensors)
    for name in ("encoder_embeddings.caption.pos_emb", "encoder_embeddings.rgb@32.", "mask_token",
                 "encoder_embeddings.vector.pos_emb [2, 16], not [1, positions, 16]"):
        assert name in str(caught.value)
    assert "surplus" not in str(caught.value)


def test_biases_of_norms_without_a_bias_must_be_zero():
    tensors = tensors_of()
    tensors["encoder.0.norm1.bias"] += 1
    with pytest.raises(ValueError, match=r"norm1\.bias \[16\], not 0 in a model without biases"):
        rebuilt(tensors)


@pytest.mark.parametrize(("change", "sentence"), [
    ({"num_heads": 3}, "num_heads"),
    ({"act_layer": "GELU"}, "act_layer GELU is not supported with gated_mlp True"),
    ({"decoder_causal_mask": True}, "decoder_causal_mask True is not supported"),
    ({"qkv_bias": True}, "biases in some layers only are not supported"),
])
def test_configurations_of_other_networks_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        rebuilt(tensors_of(), change)


@pytest.mark.parametrize(("change", "sentence"), [
    ({"dim": "16"}, "dim of config.json must be a number from 4 on, not '16'"),
    ({"dim": 16.0}, "dim of config.json must be a number from 4 on, not 16.0"),
    ({"num_heads": 0}, "num_heads .* from 1 on, not 0"),
    ({"encoder_depth": -1}, "encoder_depth .* from 0 on, not -1"),
    ({"mlp_ratio": None}, "mlp_ratio .* not None"),
    ({"dim": 10**12}, "dim .* not 1000000000000"),
    ({"mlp_ratio": float("inf")}, "mlp_ratio .* not inf"),
    ({"num_register_tokens": "1"}, "num_register_tokens .* a whole number"),
    ({"domains_in": None}, "domains_in of config.json must be a list of names, not None"),
    ({"domains_out": "caption"}, "must be a list of names, not 'caption'"),
])
def test_settings_of_another_kind_are_named(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        rebuilt(tensors_of(), change)


def test_a_network_of_more_blocks_than_the_file_has_tensors_is_never_built():
    for key in ("encoder_depth", "decoder_depth"):
        with pytest.raises(ValueError, match=f"{key} of config.json is 100000, but .* tensors"):
            rebuilt(tensors_of(), {key: 100_000})


@pytest.mark.parametrize(("name", "data", "sentence"), [
    ("config.json", b"[" * 100_000, "nested too deep"),
    ("config.json", b"3", "holds no object"),
    ("config.json", b"\xff\xfe{", "config.json is damaged"),
    ("modalities.json", b"[" * 100_000, "nested too deep"),
    ("modalities.json", b"{", "modalities.json is damaged"),
    ("modalities.json", b"3", "holds no list"),
    ("modalities.json", b"[3]", "another version: a modality is no object"),
    ("modalities.json", b'[{"name": 3}]', "name is '3'"),
    ("modalities.json", b'[{"name": "x", "kind": "img", "max_tokens": 2.5}]', "max_tokens is"),
    ("modalities.json", b'[{"name": "x", "kind": "img", "max_tokens": 1, "vocab_size": '
     b'1000000000000}]', "with 1000000000000 of anything"),
])
def test_descriptions_that_are_none_are_refused_by_the_name_of_their_file(name, data, sentence):
    contents = checkpoint.files(make())
    with pytest.raises(ValueError, match=sentence):
        checkpoint.build({**contents, name: data})


def test_sequences_with_learned_positions_are_not_taken_for_grids():
    tensors = tensors_of()
    tensors["encoder_embeddings.caption.pos_emb"] = torch.randn(1, 512, CONFIG.dim)
    with pytest.raises(ValueError, match=r"caption.pos_emb \[512, 16\], .* not supported"):
        rebuilt(tensors)


def test_an_incomplete_configuration_names_what_it_lacks():
    contents = checkpoint.files(make())
    config = json.loads(contents["config.json"])
    del config["dim"], config["domains_out"]
    with pytest.raises(ValueError, match=r"config\.json lacks domains_out, dim"):
        checkpoint.build({**contents, "config.json": json.dumps(config).encode()})


def test_unknown_settings_are_warned_of_and_harmless_ones_are_not(recwarn):
    rebuilt(tensors_of(), {"drop_path_rate_encoder": 0.1, "use_act_checkpoint": True})
    assert not recwarn.list
    with pytest.warns(UserWarning, match="unknown settings, which are ignored: novelty"):
        rebuilt(tensors_of(), {"novelty": 1})


def test_a_hub_model_is_downloaded_at_its_revision(tmp_path, monkeypatch):
    fourm.save_released(make(), tmp_path)
    asked = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, sorted(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for model in (fourm.load("org/small@abc"), fourm.load("org/small", "abc")):
        assert torch.equal(loss(model), loss(make()))
    fourm.load("org/small")
    files = sorted(checkpoint.FILES)
    assert asked == [("org/small", "abc", files)] * 2 + [("org/small", None, files)]


def test_what_is_neither_a_folder_nor_a_hub_model_is_said_so(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> str:
        raise ConnectionError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        fourm.load("./nowhere/at/all")
    with pytest.raises(FileNotFoundError, match="as a hub id it cannot be downloaded: offline"):
        fourm.load("org/small")
    with pytest.raises(ValueError, match="names another revision than 'b'"):
        fourm.load("org/small@a", "b")
    with pytest.raises(ValueError, match="has no revision 'b'"):
        fourm.load(tmp_path, "b")
    with pytest.raises(FileNotFoundError, match=r"lacks config\.json and model\.safetensors"):
        fourm.load(tmp_path)


def test_untied_matrices_stay_apart():
    model = make(UNTIED)
    assert not torch.equal(model.dec_tokens.weight[:6], model.heads.weight[:6])
    again = rebuilt(tensors_of(model), contents=checkpoint.files(model))
    assert torch.equal(again.dec_tokens.weight, model.dec_tokens.weight)


def test_importing_the_package_does_not_import_torch():
    code = "import sys, models.fourm; assert 'torch' not in sys.modules; models.fourm.load"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
