"""Teachers of dense maps: depth, surface normals and semantic segmentation.

Small networks of production classes, taught on scenes of 128 px. The shipped ones, trained on a
share of a busy core, and what they reach on 150 to 200 held-out scenes:

    depth    GLPN, 0.65 M weights, from nothing: 31,000 scenes in 6 + 7 minutes (the second time
             with --resume), delta1 0.987, AbsRel 0.055; outlines are soft
    normal   TIPSv2-DPT, a ViT of 8 px patches, 0.76 M, from nothing: 21,000 scenes in 10
             minutes, 8.5 degrees; solids are still blurred, so longer training pays
    semseg   UPerNet on the detector's ResNet, 0.47 M: 15,000 scenes in 8 minutes, mIoU 0.95.
             Shapes take longest to learn and the detector knows them (a UPerNet from nothing was
             at 0.37 after as much time), so train `det` first
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infra.scenes import CLASSES, MAX_DEPTH, SHAPES
from models.labelers.base import WEIGHTS
from tasks.teachers.data import SIZE
from tasks.teachers.teaching import Indices, Teacher, images_of, maps_of

if TYPE_CHECKING:
    from transformers import RTDetrV2ForObjectDetection

SOLID_WEIGHT = 1.0
FIRST_SOLID = CLASSES.index(SHAPES[0])

SEMSEG_SIZE = 192
"""Pixels the segmenter enlarges images to: its finest maps are a quarter of that."""

Maps = dict[str, Tensor]


def _build_depth() -> tuple[nn.Module, Any]:
    from transformers import GLPNConfig, GLPNForDepthEstimation, GLPNImageProcessor

    config = GLPNConfig(
        hidden_sizes=[24, 48, 96, 128],
        depths=[1, 1, 2, 1],
        sr_ratios=[8, 4, 2, 1],
        num_attention_heads=[1, 2, 3, 4],
        mlp_ratios=[2, 2, 2, 2],
        decoder_hidden_size=16,
        max_depth=int(MAX_DEPTH),
        drop_path_rate=0.0,
    )
    return GLPNForDepthEstimation(config), GLPNImageProcessor(size_divisor=32)


def _depth_error(model: nn.Module, batch: Maps) -> Tensor:
    predicted = model(batch["image"]).predicted_depth.float().clamp_min(0.1)
    return (predicted.log() - batch["depth"].float().log()).abs()


def _build_normal() -> tuple[nn.Module, Any]:
    from transformers import (
        Tipsv2DptConfig,
        Tipsv2DptForNormalEstimation,
        Tipsv2DptImageProcessor,
        Tipsv2VisionConfig,
    )

    # The class declares neither the layers a backbone hands out nor the inner width.
    undeclared: dict[str, Any] = {"out_indices": [1, 2, 3, 4], "intermediate_size": 288}
    backbone = Tipsv2VisionConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        patch_size=8,
        image_size=SIZE,
        num_register_tokens=1,
        layerscale_value=1.0,
        apply_layernorm=True,
        reshape_hidden_states=False,
        **undeclared,
    )
    config = Tipsv2DptConfig(
        backbone_config=backbone,
        neck_hidden_sizes=[24, 32, 48, 64],
        fusion_hidden_size=24,
        reassemble_factors=[2, 1, 0.5, 0.25],
    )
    processor = Tipsv2DptImageProcessor(size={"height": SIZE, "width": SIZE})
    network = Tipsv2DptForNormalEstimation(config)
    network.set_attn_implementation("eager")  # twice as fast to train on a CPU at this size
    return network, processor


def _normal_error(model: nn.Module, batch: Maps) -> Tensor:
    expected = F.normalize(batch["normal"].float().permute(0, 3, 1, 2), dim=1)
    predicted = F.interpolate(model(batch["image"]).normals.float(), SIZE, mode="bilinear")
    predicted = F.normalize(predicted, dim=1)
    # The distance between unit vectors grows with the angle itself, so that small errors count.
    return (predicted - expected).square().sum(1).add(1e-5).sqrt()


def _build_semseg() -> tuple[nn.Module, Any]:
    from transformers import SegformerImageProcessor, UperNetConfig, UperNetForSemanticSegmentation

    detector = _detector()
    names = dict(enumerate(CLASSES))
    backbone: Any = copy.deepcopy(detector.config.backbone_config)
    backbone.out_features = ["stage1", "stage2", "stage3", "stage4"]
    config = UperNetConfig(
        backbone_config=backbone,
        hidden_size=32,
        use_auxiliary_head=False,
        id2label=names,
        label2id={name: number for number, name in names.items()},
    )
    network = UperNetForSemanticSegmentation(config)
    features: Any = detector.model.backbone
    network.backbone.load_state_dict(features.model.state_dict())
    processor = SegformerImageProcessor(
        size={"height": SEMSEG_SIZE, "width": SEMSEG_SIZE},
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
    )
    return network, processor


def _detector() -> RTDetrV2ForObjectDetection:
    """The shipped detector: its backbone tells shapes apart, which takes longest to learn."""
    from transformers import RTDetrV2ForObjectDetection

    if not (WEIGHTS / "det").is_dir():
        raise ValueError("semseg starts from the detector: train it first (tasks.teachers det)")
    return RTDetrV2ForObjectDetection.from_pretrained(WEIGHTS / "det", dtype=torch.float32)


def _semseg_error(model: nn.Module, batch: Maps) -> Tensor:
    image = F.interpolate(batch["image"], SEMSEG_SIZE, mode="bilinear", antialias=True)
    logits = F.interpolate(model(image).logits.float(), SIZE, mode="bilinear")
    return F.cross_entropy(logits, batch["classes"].long(), reduction="none")


class DenseTeacher(Teacher):
    """A teacher of one map a picture; subclasses name it.

    Attributes:
        maps: Arrays of the scenes that its loss takes, beside the classes.
        make: Makes the untrained network and its image processor.
        error: (network, batch) to what each pixel is wrong by, [B, S, S].
        muon: Start of the names of matrices that Muon trains; AdamW trains the others.
    """

    batch_size = 16  # on one core, twice the steps are worth more than smoother ones
    lr = 2e-3
    maps: tuple[str, ...] = ()
    make: Callable[[], tuple[nn.Module, Any]]
    error: Callable[[nn.Module, Maps], Tensor]
    muon = ""

    def build(self) -> tuple[nn.Module, list[Any]]:
        """The network and its processor."""
        network, processor = type(self).make()
        return network, [processor]

    def examples(self, chosen: Indices, rng: np.random.Generator, mirrored: bool) -> Maps:
        """Image and maps; the normals of a mirrored picture point the other way along x."""
        arrays = {name: getattr(self.scenes, name) for name in (*self.maps, "classes")}
        batch = {name: maps_of(array, chosen, mirrored) for name, array in arrays.items()}
        if mirrored and "normal" in batch:
            batch["normal"] = batch["normal"] * torch.tensor([-1, 1, 1], dtype=torch.int8)
        return {"image": images_of(self.scenes, chosen, mirrored), **batch}

    def loss(self, model: nn.Module, batch: Maps) -> tuple[Tensor, dict[str, Tensor]]:
        """Solids count twice: they are a seventh of the pixels, and all the difficulty."""
        emphasis = 1.0 + SOLID_WEIGHT * (batch["classes"] >= FIRST_SOLID)
        return (type(self).error(model, batch) * emphasis).mean(), {}

    def is_hidden(self, name: str) -> bool:
        """What Muon trains."""
        return bool(self.muon) and name.startswith(self.muon)


class DepthTeacher(DenseTeacher):
    """Metres."""

    maps, steps = ("depth",), 1950
    make, error = staticmethod(_build_depth), staticmethod(_depth_error)


class NormalTeacher(DenseTeacher):
    """Unit vectors."""

    maps, steps = ("normal",), 1300
    lr = 1.5e-3
    muon = "backbone.encoder"
    make, error = staticmethod(_build_normal), staticmethod(_normal_error)


class SemsegTeacher(DenseTeacher):
    """Classes."""

    steps = 950
    make, error = staticmethod(_build_semseg), staticmethod(_semseg_error)
