"""Labelers: any size of image, values of the modality table, memory, options, weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from transformers.models.eomt.modeling_eomt import EomtForUniversalSegmentationOutput

from models.labelers import KINDS, PRESETS, LabelerSpec, load_labeler, preset, weights_revision
from models.labelers.base import WEIGHTS, Image, Labeler, resize
from models.labelers.inputs import Inputs

SIZES = [(64, 64), (40, 96), (64, 64), (96, 40)]
BLOCKS = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1] * 4}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def _dinov2() -> hf.Dinov2Config:
    return hf.Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14,
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip


def _depth_anything() -> tuple[Any, Any]:
    config = hf.DepthAnythingConfig(
        backbone_config=_dinov2(), reassemble_hidden_size=16, neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8, head_hidden_size=8,
    )  # fmt: skip
    size = {"height": 56, "width": 56}
    processor = hf.DPTImageProcessor(size=size, keep_aspect_ratio=True, ensure_multiple_of=14)
    return hf.DepthAnythingForDepthEstimation(config), processor


def _glpn() -> tuple[Any, Any]:
    config = hf.GLPNConfig(**BLOCKS, decoder_hidden_size=8, max_depth=20)
    return hf.GLPNForDepthEstimation(config), hf.GLPNImageProcessor()


def _tipsv2() -> tuple[Any, Any]:
    backbone = hf.Tipsv2VisionConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        image_size=56, patch_size=14, out_indices=[1, 2, 3, 4], reshape_hidden_states=False,
    )  # fmt: skip
    config = hf.Tipsv2DptConfig(
        backbone_config=backbone, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8
    )
    processor = hf.Tipsv2DptImageProcessor(size={"height": 56, "width": 56})
    return hf.Tipsv2DptForNormalEstimation(config), processor


def _segformer() -> tuple[Any, Any]:
    config = hf.SegformerConfig(**BLOCKS, decoder_hidden_size=8, num_labels=7)
    return hf.SegformerForSemanticSegmentation(config), hf.SegformerImageProcessor(
        size={"height": 64, "width": 64}
    )


def _mask2former() -> tuple[Any, Any]:
    backbone = hf.SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = hf.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, num_queries=4, num_labels=5,
    )  # fmt: skip
    processor = hf.Mask2FormerImageProcessor(size={"height": 64, "width": 64})
    return hf.Mask2FormerForUniversalSegmentation(config), processor


def _eomt() -> tuple[Any, Any]:
    config = hf.EomtConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=16,
        num_blocks=1, num_queries=4, num_upscale_blocks=1, num_labels=5, num_register_tokens=1,
    )  # fmt: skip
    processor = hf.EomtImageProcessor(
        size={"shortest_edge": 64, "longest_edge": None}, do_split_image=True
    )
    return hf.EomtForUniversalSegmentation(config), processor


def _panoptic_eomt() -> tuple[Any, Any]:
    size = {"shortest_edge": 64, "longest_edge": 64}
    return _eomt()[0], hf.EomtImageProcessor(size=size, do_split_image=False, do_pad=True)


def _clip() -> tuple[Any, Any]:
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 8}  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 20}  # fmt: skip
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    return hf.CLIPModel(config), hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)


def _siglip() -> tuple[Any, Any]:
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 8}  # fmt: skip
    config = hf.SiglipVisionConfig(**vision)
    processor = hf.SiglipImageProcessor(size={"height": 32, "width": 32})
    return hf.SiglipVisionModel(config), processor


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Callable[[], tuple[Any, Any]]], str]:
    """Write a tiny random checkpoint, as a hub folder holds it."""

    def write(build: Callable[[], tuple[Any, Any]]) -> str:
        for part in build():
            part.save_pretrained(tmp_path)
        return str(tmp_path)

    return write


def _spec(kind: str, folder: str, **options: Any) -> LabelerSpec:
    return LabelerSpec(
        kind, (kind,), folder, batch_size=2, precision="fp32", device="cpu", options=options
    )


@pytest.mark.parametrize(
    ("build", "scale"), [(_depth_anything, "inverse"), (_glpn, "metric")]
)
def test_depth_has_the_size_of_the_image_and_lies_in_0_to_1(save, images, build, scale):
    labeler = load_labeler(_spec("depth", save(build), scale=scale))
    values = labeler.label(images)["depth"]
    assert [value.shape for value in values] == SIZES
    assert all(v.dtype == np.float32 and v.min() >= 0 and v.max() <= 1 for v in values)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"scale": "inverse"}, [1, 0.5, 0]), ({"scale": "metric", "max_depth": 8}, [0.25, 0.5, 0.75])],
)
def test_depth_grows_with_distance_whatever_the_network_predicts(
    save, monkeypatch, options, expected
):
    labeler = load_labeler(_spec("depth", save(_glpn), **options))
    output = torch.tensor([2.0, 4.0, 6.0]).repeat_interleave(12).expand(1, 36, 36)
    monkeypatch.setattr(labeler, "model", lambda **_: SimpleNamespace(predicted_depth=output))
    value = labeler.label([np.zeros((36, 36, 3), np.uint8)])["depth"][0]
    np.testing.assert_allclose(value[0, ::12], expected)


@pytest.mark.parametrize("size", [(30, 50), (64, 41)])
@pytest.mark.parametrize("kind", ["depth_pro", "zoedepth"])
def test_depth_in_a_network_s_own_terms_is_metres_as_its_processor_has_them(save, kind, size):
    rows, columns = torch.linspace(1, 2, 24)[:, None], torch.linspace(1, 3, 32)
    told = hf.models.depth_pro.modeling_depth_pro.DepthProDepthEstimatorOutput(
        predicted_depth=torch.stack([rows + columns, rows * 2 + columns]),
        field_of_view=torch.tensor([50.0, 70.0]),
    )
    labeler = load_labeler(_spec("depth", save(_glpn), max_depth=20))
    labeler.kind, sizes = kind, {"target_sizes": [size, size]}
    if kind == "depth_pro":
        processor = hf.DepthProImageProcessor(resample=2)
    else:
        processor, sizes["source_sizes"] = hf.ZoeDepthImageProcessor(), sizes["target_sizes"]
    labeler.inputs.processor = processor
    expected = processor.post_process_depth_estimation(told, **sizes)
    found = labeler.finish(told, [np.zeros((*size, 3), np.uint8)] * 2)["depth"]
    for value, each in zip(found, expected, strict=True):
        np.testing.assert_allclose(value * 20, each["predicted_depth"], atol=0.02)


def test_depth_of_a_picture_is_not_that_of_what_fills_its_last_patches(save, images):
    labeler = load_labeler(_spec("depth", save(_glpn), max_depth=1))
    labeler.kind, labeler.inputs = "dpt", Inputs(labeler, hf.DPTImageProcessor(
        do_resize=False, do_normalize=False, do_pad=True, size_divisor=14
    ))  # fmt: skip
    labeler.model = lambda pixel_values: SimpleNamespace(predicted_depth=pixel_values[:, 0])
    for value, image in zip(labeler.label(images)["depth"], images, strict=True):
        np.testing.assert_allclose(value, image[..., 0] / 255, atol=1e-5)


def test_normals_are_unit_vectors_and_obey_signs(save, images):
    folder = save(_tipsv2)
    plain = load_labeler(_spec("normal", folder)).label(images)["normal"]
    turned = load_labeler(_spec("normal", folder, signs=[1, -1, -1])).label(images)["normal"]
    assert [value.shape for value in plain] == [(*size, 3) for size in SIZES]
    np.testing.assert_allclose(np.linalg.norm(plain[1], axis=-1), 1, atol=1e-4)
    np.testing.assert_allclose(plain[1] * [1, -1, -1], turned[1], atol=1e-6)


@pytest.mark.parametrize(
    ("build", "classes"), [(_segformer, 7), (_mask2former, 5), (_eomt, 5)]
)
def test_segmentation_is_a_class_id_a_pixel_for_pixel_and_universal_networks(
    save, images, build, classes
):
    values = load_labeler(_spec("semseg", save(build))).label(images)["semseg"]
    assert [value.shape for value in values] == SIZES
    assert all(value.dtype == np.uint8 and value.max() < classes for value in values)


@pytest.mark.parametrize("size", [(30, 60), (90, 45)])
def test_what_fills_a_picture_up_to_a_square_is_not_in_its_classes(save, monkeypatch, size):
    labeler = load_labeler(_spec("semseg", save(_panoptic_eomt)))
    image = np.zeros((*size, 3), np.uint8)
    image[size[0] // 2 :] = 255

    def network(pixel_values: torch.Tensor) -> Any:
        """Class 0 where it is dark, as what fills up is, and 1 where it is bright."""
        shade = pixel_values[:, :1]
        masks = torch.cat([shade < -1.0, shade > 1.0], 1) * 20.0 - 10
        classes = torch.eye(2, 6).expand(len(masks), 2, 6) * 20
        return EomtForUniversalSegmentationOutput(
            masks_queries_logits=masks, class_queries_logits=classes
        )

    monkeypatch.setattr(labeler, "model", network)
    (value,) = labeler.label([image])["semseg"]
    expected = image[..., 0] // 255
    assert value.shape == expected.shape
    assert (value == expected).mean() > 0.95


@pytest.mark.parametrize("build", [_clip, _siglip])
def test_clip_features_cover_the_whole_image_on_the_patch_grid(save, images, build):
    folder = save(build)
    values = load_labeler(_spec("clip", folder)).label(images)["clip"]
    assert all(value.shape == (4, 4, 16) and value.dtype == np.float16 for value in values)
    edge = images[1].copy()
    edge[:, :4] = 255  # a centre crop of this wide image would not see its left edge
    changed = load_labeler(_spec("clip", folder)).label([edge])["clip"][0]
    assert np.abs(changed[:, 0].astype(float) - values[1][:, 0]).max() > 1e-3


def test_clip_features_at_another_size_interpolate_positions(save, images):
    spec = _spec("clip", save(_clip), image_size=64)
    assert load_labeler(spec).label(images)["clip"][0].shape == (8, 8, 16)


def test_labels_do_not_depend_on_what_else_is_in_the_batch(save, images):
    labeler = load_labeler(_spec("depth", save(_glpn)))
    together = labeler.label(images)["depth"]
    alone = labeler.label(images[2:3])["depth"][0]
    np.testing.assert_allclose(together[2], alone, atol=1e-5)


class _Counting(Labeler):
    """Runs out of memory above `limit` images."""

    limit = 3

    def __init__(self, spec: LabelerSpec) -> None:
        super().__init__(spec)
        self.sizes: list[int] = []

    def predict(self, images: Sequence[Image]) -> dict[str, list[Any]]:
        if len(images) > self.limit:
            raise torch.OutOfMemoryError("no memory")
        self.sizes.append(len(images))
        return {"caption": [str(image[0, 0, 0]) for image in images]}


def test_memory_that_runs_out_halves_the_batch_for_good_and_loses_no_label():
    images = [np.full((4, 4, 3), number, np.uint8) for number in range(10)]
    labeler = _Counting(LabelerSpec("caption", ("caption",), "none", batch_size=8, device="cpu"))
    assert labeler.label(images)["caption"] == [str(number) for number in range(10)]
    assert labeler.sizes == [2] * 5


def test_an_image_too_large_for_the_memory_is_an_error():
    labeler = _Counting(LabelerSpec("caption", ("caption",), "none", device="cpu"))
    labeler.limit = 0
    with pytest.raises(MemoryError, match=r"labeler caption.*no memory"):
        labeler.label([np.zeros((4, 4, 3), np.uint8)])


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4)])
def test_what_is_no_rgb_image_is_refused(shape):
    labeler = _Counting(LabelerSpec("caption", ("caption",), "none", device="cpu"))
    with pytest.raises(ValueError, match="uint8"):
        labeler.label([np.zeros(shape, np.uint8)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"precision": "int8"}, "fp32"), ({"device": "tpu"}, "cuda"), ({"batch_size": 0}, "below 1")],
)
def test_a_specification_names_the_valid_choices(fields, message):
    with pytest.raises(ValueError, match=message):
        LabelerSpec("depth", ("depth",), "x", **fields)


def test_a_specification_survives_json():
    spec = _spec("depth", "folder", scale="inverse")
    assert LabelerSpec.from_dict(spec.to_dict()) == spec


def test_unknown_kinds_presets_options_and_weights_are_named(save):
    with pytest.raises(ValueError, match="depth, normal"):
        load_labeler(_spec("pose", "x"))
    with pytest.raises(ValueError, match="scenes, modern, released"):
        preset("old")
    with pytest.raises(ValueError, match="no option sacle; it has max_depth, scale"):
        load_labeler(_spec("depth", save(_glpn), sacle="metric"))
    with pytest.raises(ValueError, match="no shipped weights 'shipped:nothing'"):
        load_labeler(_spec("depth", "shipped:nothing"))


def test_presets_for_photographs_hold_every_kind_and_scenes_what_needs_no_download():
    for name in set(PRESETS) - {"scenes"}:
        assert set(preset(name)) == set(KINDS)
    for kind, spec in preset("scenes").items():
        assert kind in KINDS
        assert spec.model_id.startswith("shipped:") or spec.model_id == "computed"


def test_the_scenes_preset_is_the_one_that_stored_labels_were_made_with():
    from infra.stages import Stage
    from tasks.label import label_stage

    fetch = Stage("fetch", 1, {}, ("rgb", "caption"))
    spec = preset("scenes")["semseg"]
    assert label_stage(spec, fetch).fingerprint == Stage(
        "label:semseg", 2, {"options": {}, "precision": "auto"}, ("semseg",), (fetch,),
        "shipped:semseg", weights_revision(spec),
    ).fingerprint  # fmt: skip


def test_the_revision_of_a_folder_changes_with_its_bytes(tmp_path):
    spec = _spec("depth", str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = weights_revision(spec)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert weights_revision(spec) != before
    assert weights_revision(LabelerSpec("depth", ("depth",), "org/model", revision="ab")) == "ab"


def test_resizing_leaves_maps_of_the_right_size_alone():
    maps = torch.rand(1, 1, 4, 4)
    assert resize(maps, [np.zeros((4, 4, 3), np.uint8)]) is maps


def test_shipped_weights_are_small_and_of_safe_formats():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}
    assert sum(path.stat().st_size for path in files) < 10e6
