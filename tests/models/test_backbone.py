"""Contracts of the encoder alone: embeddings of any modalities, the ViT, its place in timm."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import timm
import torch

from models import fourm
from models.fourm import timm_models
from models.fourm.backbone import Backbone, embed, pool
from models.fourm.conditions import Shown
from models.fourm.decoding import Decoding, draw
from models.fourm.embeddings import sincos_1d, sincos_2d
from models.fourm.spec import FourMConfig, ModalitySpec
from models.fourm.values import Translator
from tests.models.tiny import CONFIG, SPECS, make
from tests.models.tiny_fourm import small_text

SMALL = {"embed_dim": 16, "depth": 3, "num_heads": 2, "img_size": 32}


def pictures(rows: int = 2, height: int = 32, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 255, (rows, 3, height, width), generator=generator, dtype=torch.uint8)


def inputs() -> dict[str, torch.Tensor]:
    return {"rgb@32": pictures(), "tok_depth@32": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]),
            "caption": torch.tensor([[7, 8, 3, 0], [9, 3, 0, 0]])}


@torch.no_grad()
def test_any_set_of_modalities_is_embedded_together():
    found = embed(make(), inputs())
    assert {name: tuple(part.tokens.shape) for name, part in found.items()} == {
        "rgb@32": (2, 4, 16), "tok_depth@32": (2, 4, 16), "caption": (2, 4, 16)}
    assert found["caption"].visible.tolist() == [[True] * 3 + [False], [True] * 2 + [False] * 2]
    assert not found["caption"].tokens[~found["caption"].visible].any()
    alone = embed(make(), {"rgb@32": pictures()})
    assert not torch.allclose(alone["rgb@32"].tokens, found["rgb@32"].tokens, atol=1e-3)
    every = torch.cat([part.tokens[part.visible] for part in embed(
        make(), {name: value[:1] for name, value in inputs().items()}).values()])
    assert torch.allclose(pool(found)[0], every.mean(0), atol=1e-5)


@torch.no_grad()
def test_what_is_not_visible_changes_nothing():
    ids = inputs()["tok_depth@32"]
    visible = torch.tensor([[True, True, False, True]] * 2)
    first, second = (embed(make(), {"tok_depth@32": Shown(values, visible)})["tok_depth@32"]
                     for values in (ids, torch.where(visible, ids, 0)))
    assert torch.equal(first.tokens, second.tokens)


@torch.no_grad()
def test_feature_vectors_of_any_length_are_conditions():
    specs = (ModalitySpec(name="t5_caption", kind="seq_emb", max_tokens=4, channels=3,
                          is_target=False), SPECS[1])
    model = make(FourMConfig(modalities=specs, dim=16, num_heads=2))
    translator = Translator(model, {}, small_text())
    table = np.ones((3, 3), np.float16)
    shown = translator.show({"t5_caption": [table, {"emb": table, "mask_valid": [1, 0, 0]}, None]})
    assert shown["t5_caption"].visible.sum(1).tolist() == [3, 1, 0]
    first = embed(model, {"t5_caption": shown["t5_caption"].rows(torch.tensor([0]))})
    assert torch.isfinite(pool(first)).all()
    drawn = draw(model, shown, SPECS[1].name, Decoding(order="roar", guidance=2.0), [0, 1, 2])
    assert drawn.ids.shape == (3, 4)


def test_feature_vectors_that_are_no_numbers_are_refused_where_they_would_be_seen():
    spec = ModalitySpec(name="t5_caption", kind="seq_emb", max_tokens=4, channels=3,
                        is_target=False)  # fmt: skip
    model = make(FourMConfig(modalities=(spec, SPECS[1]), dim=16, num_heads=2))
    translator = Translator(model, {}, small_text())
    table = np.ones((3, 3), np.float16)
    table[1, 2] = np.nan
    unseen = {"emb": table, "mask_valid": [1, 0, 1]}
    assert translator.show({"t5_caption": [unseen]})["t5_caption"].visible.sum() == 2
    with pytest.raises(ValueError, match="t5_caption takes finite numbers, but some are none"):
        translator.show({"t5_caption": [table]})


@pytest.mark.parametrize(("given", "sentence"), [
    ({}, "one batch of samples"),
    ({"sound": pictures()}, "unknown modality 'sound'"),
    ({"rgb@32": pictures(2, 64, 64)}, "16 positions, the model's 4; `Backbone` takes any size"),
    ({"rgb@32": pictures(2, 30, 32)}, "30 x 32 do not divide into patches of 16"),
    ({"rgb@32": pictures()[:, :1]}, r"floats \[B, 3, H, W\], not torch.uint8 \[2, 1, 32, 32\]"),
    ({"rgb@32": pictures()[0]}, r"\[B, 3, H, W\], not torch.uint8 \[3, 32, 32\]"),
    ({"rgb@32": pictures().long()}, r"\[B, 3, H, W\], not torch.int64"),
    ({"tok_depth@32": torch.rand(2, 4)}, r"token ids int64 \[B, L\], not torch.float32 \[2, 4\]"),
    ({"tok_depth@32": torch.zeros(2, 2, 2, dtype=torch.int64)}, r"not torch.int64 \[2, 2, 2\]"),
    ({"tok_depth@32": torch.tensor([[0, 1, 2, 99]])}, r"of tok_depth@32 lie in 0..\d+, not 0..99"),
    ({"caption": torch.tensor([[-3, 1]])}, r"ids of caption lie in 0..\d+, not -3..1"),
    ({"rgb@32": pictures(1), "caption": inputs()["caption"]}, "one batch of samples"),
])
def test_inputs_that_do_not_fit_are_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        embed(make(), given)


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 2])
def test_the_backbone_is_the_encoder_over_pixels(registers):
    model = make(dataclasses.replace(CONFIG, num_register_tokens=registers))
    net = Backbone.of(model)
    wanted = embed(model, {"rgb@32": pictures()})["rgb@32"].tokens
    found = net.forward_features(pictures())
    assert torch.allclose(found[:, registers:], wanted, atol=1e-5)
    assert torch.allclose(net(pictures()), wanted.mean(1), atol=1e-5)


@torch.no_grad()
def test_other_sizes_and_rectangles_get_a_table_of_their_own():
    net = Backbone.of(make())
    assert net.forward_features(pictures(1, 48, 80)).shape == (1, 15, 16)
    table, axis = sincos_2d(3, 16, 5), sincos_1d(5, 8)
    assert torch.equal(table[7], torch.cat([axis[1], axis[2]]))  # row 1, column 2


def test_learned_positions_and_other_modalities_are_refused_by_name():
    learned = dataclasses.replace(SPECS[0], learned_positions=True)
    net = Backbone(FourMConfig(modalities=(learned, *SPECS[1:]), dim=16, num_heads=2))
    with pytest.raises(ValueError, match="learned positions for 2 x 2 patches, not for 3 x 2"):
        net(pictures(1, 48, 32))
    with pytest.raises(ValueError, match=r"no pixels depth .* there are rgb@32"):
        Backbone(CONFIG, "depth")


@torch.no_grad()
def test_pictures_of_other_kinds_are_refused():
    net = Backbone.of(make())
    for wrong in (pictures()[:, :1], pictures()[0], pictures().long()):
        with pytest.raises(ValueError, match=r"floats \[B, 3, H, W\], not torch"):
            net(wrong)


def test_checkpointed_blocks_give_the_same_gradient():
    grads = []
    for checkpointed in (False, True):
        net = Backbone.of(make()).train()
        net.set_grad_checkpointing(checkpointed)
        net(pictures()).square().sum().backward()
        grads.append(net.blocks[0].attn.qkv.weight.grad)
    assert torch.allclose(*grads, atol=1e-6)


@torch.no_grad()
def test_intermediates_are_the_outputs_of_blocks():
    torch.manual_seed(0)
    net = timm_models.FourMViT(**SMALL).eval()
    final, maps = net.forward_intermediates(pictures(), norm=True)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 2, 2)] * 3
    assert torch.equal(final, net.forward_features(pictures()))
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), final)
    early = net.forward_intermediates(pictures(), [0], stop_early=True, output_fmt="NLC",
                                      intermediates_only=True)
    wanted = net.forward_intermediates(pictures(), 3, intermediates_only=True)[0]
    assert torch.equal(early[0].transpose(1, 2).reshape(2, 16, 2, 2), wanted)
    for indices in ([3], 4, []):
        with pytest.raises(ValueError, match="the 3 blocks"):
            net.forward_intermediates(pictures(), indices)
    with pytest.raises(ValueError, match="NCHW or NLC, got 'NHWC'"):
        net.forward_intermediates(pictures(), output_fmt="NHWC")


@torch.no_grad()
def test_timm_creates_every_size_and_its_features():
    assert len(timm.list_models("fourm_*_patch16_224")) == 5
    net = timm.create_model("fourm_tiny_patch16_224", features_only=True, out_indices=(0, -1),
                            **SMALL)
    assert [tuple(m.shape) for m in net(pictures())] == [(2, 16, 2, 2)] * 2
    assert net.feature_info.channels() == [16, 16]
    assert net.feature_info.reduction() == [16, 16]
    head = timm.create_model("fourm_base_patch16_224", num_classes=7, **SMALL)
    assert head(pictures()).shape == (2, 7)
    head.reset_classifier(0)
    assert head(pictures()).shape == (2, 16)


@torch.no_grad()
def test_timm_hides_features_from_the_head_in_training_alone():
    plain, dropped = (timm.create_model("fourm_base_patch16_224", num_classes=7, drop_rate=rate,
                                        **SMALL) for rate in (0.0, 0.5))
    dropped.load_state_dict(plain.state_dict())
    assert (dropped.forward_head(torch.ones(8, 4, 16), pre_logits=True) == 0).any()
    assert torch.equal(dropped.eval()(pictures()), plain.eval()(pictures()))


@torch.no_grad()
def test_timm_leads_pictures_past_blocks_in_training_alone_the_later_the_more_often():
    sizes = {**SMALL, "depth": 2}
    plain, dropped = (timm.create_model("fourm_base_patch16_224", drop_path_rate=rate, **sizes)
                      for rate in (0.0, 0.5))
    dropped.load_state_dict(plain.state_dict())
    x = pictures(1).expand(64, -1, -1, -1)
    torch.testing.assert_close(plain.eval()(x), dropped.eval()(x))
    _, (first, last) = plain.forward_intermediates(x[:1], output_fmt="NLC")
    past, through = (plain.norm(y).mean(1) for y in (first, first + 2 * (last - first)))
    torch.manual_seed(0)
    found = dropped.train()(x)
    near = [torch.isclose(found, each, atol=1e-5).all(1) for each in (past, through)]
    assert (near[0] ^ near[1]).all()
    assert 16 < int(near[0].sum()) < 48
    with pytest.raises(ValueError, match=r"drop_path_rate=1.0 is not a share"):
        timm.create_model("fourm_base_patch16_224", drop_path_rate=1.0, **SMALL)


def test_timm_lets_learning_rates_fall_with_depth():
    from timm.optim import param_groups_layer_decay  # it sets limits of torch's compiler

    net = timm.create_model("fourm_base_patch16_224", num_classes=7, **SMALL)
    groups = param_groups_layer_decay(
        net, 0.05, no_weight_decay_list=net.no_weight_decay(), layer_decay=0.5
    )
    scales = {id(each): group["lr_scale"] for group in groups for each in group["params"]}
    found = [scales[id(net.get_parameter(name))] for name in (
        "patches.proj.weight", "modality", "blocks.0.norm1.weight", "blocks.1.norm1.weight",
        "blocks.2.norm1.weight", "norm.weight", "head.weight")]
    assert found == [0.0625, 0.0625, 0.125, 0.25, 0.5, 0.5, 1.0]
    undecayed = {id(each) for group in groups if not group["weight_decay"]
                 for each in group["params"]}
    assert id(net.modality) in undecayed
    assert id(net.head.weight) not in undecayed


def test_timm_takes_the_encoder_of_a_released_file_and_refuses_another(tmp_path):
    specs = (dataclasses.replace(SPECS[0], name="rgb@224"), ModalitySpec(
        name="tok_rgb@224", kind="img", max_tokens=4, vocab_size=9))
    config = FourMConfig(modalities=specs, dim=16, encoder_depth=3, decoder_depth=1, num_heads=2)
    overlay = {"file": str(tmp_path / "model.safetensors")}
    model = make(config)
    fourm.save_released(model, tmp_path)
    for classes in (0, 4):
        net = timm.create_model("fourm_base_patch16_224", pretrained=True, num_classes=classes,
                                pretrained_cfg_overlay=overlay, **SMALL).eval()
        wanted = Backbone.of(model).forward_features(pictures())
        assert torch.equal(net.forward_features(pictures()), wanted)
    fourm.save_released(make(dataclasses.replace(config, qk_norm=True)), tmp_path)
    with pytest.raises(ValueError, match=r"not this model's \(pass qk_norm=True\)"):
        timm.create_model("fourm_base_patch16_224", pretrained=True, num_classes=4,
                          pretrained_cfg_overlay=overlay, **SMALL)
