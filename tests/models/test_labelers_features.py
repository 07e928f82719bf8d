"""Feature labelers on tiny checkpoints of the real classes: maps and whole-image vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor

from models.labelers import LabelerSpec, load_labeler

WIDTH, DEPTH, HEADS, PATCH, SIDE = 16, 2, 2, 8, 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (20, 48), (32, 32), (1, 1)]
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def spec(kind: str, folder: Path, *outputs: str, **options: Any) -> LabelerSpec:
    return LabelerSpec(
        kind, outputs, str(folder), batch_size=2, precision="fp32", device="cpu", options=options
    )


def dinov2(folder: Path) -> None:
    config = hf.Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, image_size=64,
        patch_size=PATCH,
    )  # fmt: skip
    hf.Dinov2Model(config).save_pretrained(folder)
    hf.BitImageProcessor(size={"shortest_edge": 64}, crop_size=64).save_pretrained(folder)


def siglip(folder: Path) -> None:
    vision = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": HEADS, "image_size": 32, "patch_size": PATCH}  # fmt: skip
    text = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": HEADS, "vocab_size": 20}  # fmt: skip
    hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    hf.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def imagebind_tensors() -> dict[str, Tensor]:
    """A state dict of the published names, other senses included."""
    pre, trunk = "modality_preprocessors.vision.", "modality_trunks.vision."
    shapes = {
        pre + "cls_token": (1, 1, WIDTH),
        pre + "rgbt_stem.proj.1.weight": (WIDTH, 3, 2, PATCH, PATCH),
        pre + "pos_embedding_helper.pos_embed": (1, 1 + SIDE**2, WIDTH),
        trunk + "pre_transformer_layer.0.weight": (WIDTH,),
        trunk + "pre_transformer_layer.0.bias": (WIDTH,),
        "modality_heads.vision.0.weight": (WIDTH,),
        "modality_heads.vision.0.bias": (WIDTH,),
        "modality_heads.vision.2.weight": (12, WIDTH),
        "modality_preprocessors.text.token_embedding.weight": (7, WIDTH),
    }
    for number in range(DEPTH):
        block = f"{trunk}blocks.{number}."
        shapes |= {
            block + "attn.in_proj_weight": (3 * WIDTH, WIDTH),
            block + "attn.in_proj_bias": (3 * WIDTH,),
            block + "attn.out_proj.weight": (WIDTH, WIDTH),
            block + "attn.out_proj.bias": (WIDTH,),
            block + "mlp.fc1.weight": (4 * WIDTH, WIDTH),
            block + "mlp.fc1.bias": (4 * WIDTH,),
            block + "mlp.fc2.weight": (WIDTH, 4 * WIDTH),
            block + "mlp.fc2.bias": (WIDTH,),
        }
        for norm in ("norm_1", "norm_2"):
            shapes |= {f"{block}{norm}.weight": (WIDTH,), f"{block}{norm}.bias": (WIDTH,)}
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def imagebind(folder: Path) -> dict[str, Tensor]:
    tensors = imagebind_tensors()
    save_file(tensors, folder / "model.safetensors")
    config = {"vision_embed_dim": WIDTH, "vision_num_blocks": DEPTH, "vision_num_heads": HEADS}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def as_published(tensors: dict[str, Tensor], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The published computation, spelled out: a film of two frames, torch's own attention."""
    pre, trunk = "modality_preprocessors.vision.", "modality_trunks.vision."

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            x, (WIDTH,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps=1e-6
        )

    film = pixels[:, :, None].repeat(1, 1, 2, 1, 1)
    kernel = tensors[pre + "rgbt_stem.proj.1.weight"]
    x = F.conv3d(film, kernel, stride=(2, PATCH, PATCH)).flatten(2).mT
    x = torch.cat([tensors[pre + "cls_token"].expand(len(x), -1, -1), x], 1)
    x = norm(x + tensors[pre + "pos_embedding_helper.pos_embed"], trunk + "pre_transformer_layer.0")
    for number in range(DEPTH):
        block = f"{trunk}blocks.{number}."
        attention = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        attention.load_state_dict(
            {name: tensors[f"{block}attn.{name}"] for name in attention.state_dict()}
        )
        seen = norm(x, block + "norm_1")
        x = x + attention(seen, seen, seen, need_weights=False)[0]
        inner = F.linear(norm(x, block + "norm_2"), *(tensors[f"{block}mlp.fc1.{p}"]
                                                      for p in ("weight", "bias")))
        x = x + F.linear(F.gelu(inner), *(tensors[f"{block}mlp.fc2.{p}"]
                                          for p in ("weight", "bias")))
    return x[:, 1:], norm(x, "modality_heads.vision.0")[:, 0]


@pytest.mark.parametrize(
    ("kind", "write", "size"),
    [("dinov2", dinov2, 32), ("imagebind", siglip, 0), ("imagebind", imagebind, 0)],
)
def test_a_map_and_a_vector_come_from_one_pass_for_any_image(tmp_path, images, kind, write, size):
    write(tmp_path)
    outputs = (kind, f"{kind}_global")
    found = load_labeler(spec(kind, tmp_path, *outputs, image_size=size)).label(images)
    assert set(found) == set(outputs)
    assert all(v.shape == (4, 4, WIDTH) and v.dtype == np.float16 for v in found[kind])
    assert all(v.shape == (WIDTH,) and v.dtype == np.float16 for v in found[outputs[1]])
    assert all(np.isfinite(value).all() for values in found.values() for value in values)
    assert np.abs(found[outputs[1]][0] - found[outputs[1]][2]).max() > 1e-3
    alone = load_labeler(spec(kind, tmp_path, outputs[1], image_size=size)).label(images[2:3])
    assert set(alone) == {outputs[1]}
    np.testing.assert_allclose(alone[outputs[1]][0], found[outputs[1]][2], atol=2e-3)


def test_dinov2_equals_its_network_on_the_squeezed_image(tmp_path, images):
    dinov2(tmp_path)
    outputs = ("dinov2", "dinov2_global")
    found = load_labeler(spec("dinov2", tmp_path, *outputs)).label(images[:1])
    model = hf.AutoModel.from_pretrained(tmp_path)
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path)
    inputs = processor(images=images[:1], do_center_crop=False, return_tensors="pt")
    with torch.inference_mode():
        out = model(**inputs)
    expected = out.last_hidden_state[0, 1:].view(8, 8, WIDTH)
    np.testing.assert_allclose(found["dinov2"][0], expected, atol=5e-3)
    np.testing.assert_allclose(found["dinov2_global"][0], out.pooler_output[0], atol=5e-3)


def test_imagebind_computes_what_the_published_network_computes(tmp_path):
    from models.labelers.imagebind import from_published

    tensors = imagebind_tensors()
    pixels = torch.randn(2, 3, SIDE * PATCH, SIDE * PATCH)
    with torch.inference_mode():
        found = from_published(tensors, HEADS)(pixels)
        expected = as_published(tensors, pixels)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_imagebind_at_another_size_fits_its_positions(tmp_path, images):
    imagebind(tmp_path)
    found = load_labeler(spec("imagebind", tmp_path, "imagebind", image_size=64)).label(images[:1])
    assert found["imagebind"][0].shape == (8, 8, WIDTH)


def test_what_is_no_imagebind_checkpoint_is_named(tmp_path):
    imagebind(tmp_path)
    save_file({"modality_heads.vision.0.weight": torch.ones(WIDTH)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no ImageBind checkpoint: it lacks cls_token, positions"):
        load_labeler(spec("imagebind", tmp_path, "imagebind"))


def test_a_size_between_patches_is_refused(tmp_path):
    dinov2(tmp_path)
    with pytest.raises(ValueError, match="image_size=30 is no multiple of 8"):
        load_labeler(spec("dinov2", tmp_path, "dinov2", image_size=30))


def clip(folder: Path) -> None:
    vision = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": HEADS, "image_size": 32, "patch_size": PATCH}  # fmt: skip
    text = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": HEADS, "vocab_size": 20}  # fmt: skip
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    hf.CLIPModel(config).save_pretrained(folder)
    hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)


def test_projected_patches_are_those_that_the_released_clip_tokenizer_takes(tmp_path, images):
    """Through the last norm and the projection: 512 numbers of ViT-B/16 and not its inner 768."""
    clip(tmp_path)
    found = load_labeler(spec("clip", tmp_path, "clip", projected=True)).label(images[:1])["clip"]
    model = hf.CLIPModel.from_pretrained(tmp_path)
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path)
    inputs = processor(images=images[:1], return_tensors="pt")
    with torch.inference_mode():
        hidden = model.vision_model(**inputs).last_hidden_state[0, 1:]
        expected = model.visual_projection(model.vision_model.post_layernorm(hidden))
    assert found[0].shape == (4, 4, 12)
    np.testing.assert_allclose(found[0].reshape(16, 12), expected, atol=5e-3)
    plain = load_labeler(spec("clip", tmp_path, "clip")).label(images[:1])["clip"]
    np.testing.assert_allclose(plain[0].reshape(16, WIDTH), hidden, atol=5e-3)


@pytest.mark.parametrize("write", [dinov2, siglip, imagebind])
def test_a_network_without_a_projection_says_so(tmp_path, write):
    write(tmp_path)
    with pytest.raises(ValueError, match="projected=True"):
        load_labeler(spec("imagebind", tmp_path, "imagebind", projected=True))


def test_the_released_preset_labels_clip_as_wide_as_its_tokenizer_takes():
    from models.labelers import preset
    from tasks.tokenizer_plan import FEATURES

    assert preset("released")["clip"].options == {"projected": True}
    assert FEATURES["clip"] == hf.CLIPConfig().projection_dim
