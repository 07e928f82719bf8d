"""The detection labeler runs real detectors, and the shipped one finds the solids of scenes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from infra.scenes import EVAL_SEED, SHAPES, render, sample_scene
from models.labelers.base import LabelerSpec
from models.labelers.detection import DetectionLabeler

CLASSES = {0: "cat", 1: "cup"}


def spec(source: object, **options: Any) -> LabelerSpec:
    return LabelerSpec("det", ("det",), str(source), options=options, batch_size=4, device="cpu")


def images(count: int) -> list[np.ndarray]:
    return [
        np.random.default_rng(k).integers(0, 256, (64, 80, 3), dtype=np.uint8)
        for k in range(count)
    ]


def rt_detr(folder: Path) -> None:
    from transformers import (
        RTDetrImageProcessor,
        RTDetrResNetConfig,
        RTDetrV2Config,
        RTDetrV2ForObjectDetection,
    )

    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrV2Config(
        backbone_config=backbone, encoder_in_channels=[8, 16, 16], encoder_hidden_dim=16,
        encoder_ffn_dim=16, encoder_attention_heads=2, d_model=16, decoder_ffn_dim=16,
        decoder_in_channels=[16] * 3, decoder_layers=2, decoder_attention_heads=2,
        num_queries=10, num_denoising=0, id2label=CLASSES,
    )  # fmt: skip
    RTDetrV2ForObjectDetection(config).save_pretrained(folder)
    RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


def detr(folder: Path) -> None:
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    config = DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=backbone, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2,
        decoder_attention_heads=2, num_queries=10, id2label=CLASSES,
    )  # fmt: skip
    DetrForObjectDetection(config).save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)


def yolos(folder: Path) -> None:
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=[64, 64], patch_size=16, num_detection_tokens=10, id2label=CLASSES,
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


@pytest.mark.parametrize("checkpoint", [rt_detr, detr, yolos])
def test_any_detector_gives_relative_named_boxes_best_first(checkpoint, tmp_path):
    checkpoint(tmp_path)
    values = DetectionLabeler(spec(tmp_path, threshold=0, max_instances=3)).label(images(5))["det"]
    assert len(values) == 5
    for value in values:
        found = value["instances"]
        assert len(found) <= 3
        assert [each["score"] for each in found] == sorted(
            (each["score"] for each in found), reverse=True
        )
        for each in found:
            left, top, right, bottom = each["box"]
            assert 0 <= left < right <= 1
            assert 0 <= top < bottom <= 1
            assert each["class_name"] in CLASSES.values()
    assert any(value["instances"] for value in values)


def test_corners_and_scores_are_as_fine_as_a_network_in_half_precision_tells():
    labeler = DetectionLabeler(replace(
        spec("shipped:det", threshold=0, max_overlap=1.0, max_instances=1), precision="bf16"
    ))  # fmt: skip
    logits = torch.full((1, 4, len(labeler.names)), -8.0, dtype=torch.bfloat16)
    logits[0, 0, 0] = 0.30859375
    boxes = torch.tensor([[[0.91796875, 0.6953125, 0.0517578125, 0.0927734375]] * 4]).bfloat16()
    with labeler.inference():
        outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)
        (value,) = labeler.finish(outputs, images(1))["det"]
    (best,) = value["instances"]
    x, y, width, height = boxes[0, 0].double().tolist()
    corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    np.testing.assert_allclose(best["box"], corners, atol=1e-6)
    assert best["score"] == pytest.approx(1 / (1 + np.exp(-0.30859375)), abs=1e-6)


def test_boxes_in_half_precision_lie_where_they_do_in_full():
    views = [render(sample_scene(EVAL_SEED + 2000 + k), 128).rgb for k in range(3)]
    exact, half = (
        DetectionLabeler(replace(spec("shipped:det"), precision=precision))
        for precision in ("fp32", "bf16")
    )
    with exact.inference():
        true = exact.forward(exact.prepare(views))
    with half.inference():
        found = half.forward(half.prepare(views))
    sure = true.logits.sigmoid().amax(-1) > 0.4
    apart = (found.pred_boxes - true.pred_boxes).abs()[sure]
    assert len(apart) > 3
    assert apart.mean() < 0.0004, "0.0008 where the heads are in bf16, too"


@pytest.mark.parametrize("checkpoint", [rt_detr, detr, yolos])
def test_the_heads_that_place_boxes_are_found_in_every_family(checkpoint, tmp_path):
    checkpoint(tmp_path)
    labeler = DetectionLabeler(replace(spec(tmp_path, threshold=0), precision="bf16"))
    with labeler.inference():
        outputs = labeler.forward(labeler.prepare(images(2)))
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.pred_boxes.dtype == torch.float32


def test_a_threshold_of_one_finds_nothing(tmp_path):
    rt_detr(tmp_path)
    values = DetectionLabeler(spec(tmp_path, threshold=1.0)).label(images(1))["det"]
    assert values == [{"instances": []}]


@pytest.mark.parametrize("options", [{"threshold": 2}, {"max_instances": 0}, {"treshold": 0.1}])
def test_options_outside_their_range_or_unknown_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DetectionLabeler(spec("nowhere", **options))


def test_the_shipped_detector_finds_the_solids_of_scenes_it_never_saw():
    from tasks.metrics import detection_ap50
    from tasks.teachers.detection import truth_of

    views = [render(sample_scene(EVAL_SEED + 1000 + k), 128) for k in range(8)]
    found = DetectionLabeler(spec("shipped:det")).label([view.rgb for view in views])["det"]
    assert {each["class_name"] for value in found for each in value["instances"]} <= set(SHAPES)
    assert detection_ap50(found, [truth_of(view) for view in views]) > 0.6
