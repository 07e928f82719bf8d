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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from infra.scenes import CLASSES, MAX_DEPTH, SHAPES
from models.labelers.base import WEIGHTS
from tasks.teachers.data import SIZE, TeacherScenes
from tasks.teachers.timed import save_half, shuffled, train_for

if TYPE_CHECKING:
    from transformers import RTDetrV2ForObjectDetection

BATCH = 16
"""Small: on one core, twice the steps are worth more than smoother ones."""

SOLID_WEIGHT = 1.0
FIRST_SOLID = CLASSES.index(SHAPES[0])

SEMSEG_SIZE = 192
"""Pixels the segmenter enlarges images to: its finest maps are a quarter of that."""

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class DenseTeacher:
    """How one network is built and taught.

    Attributes:
        build: Makes the untrained network and its image processor.
        loss: (network, pixels float [B, 3, S, S] in 0..1, scenes, indices, mirrored) to a loss.
        lr: Peak learning rate.
        muon: Start of the names of matrices that Muon trains; AdamW trains the others.
    """

    build: Callable[[], tuple[nn.Module, Any]]
    loss: Callable[[nn.Module, Tensor, TeacherScenes, Indices, bool], Tensor]
    lr: float = 2e-3
    muon: str = ""


def pixels(scenes: TeacherScenes, chosen: Indices, mirror: bool) -> Tensor:
    """Return images as float [B, 3, S, S] in 0..1, mirrored if asked."""
    rgb = torch.from_numpy(np.array(scenes.rgb[chosen])).permute(0, 3, 1, 2)
    rgb = rgb.flip(-1) if mirror else rgb
    return rgb.float().div_(255).contiguous(memory_format=torch.channels_last)


def truth(array: NDArray[Any], chosen: Indices, mirror: bool) -> Tensor:
    """Return maps [B, S, S, ...] of the chosen scenes, mirrored if asked."""
    maps = torch.from_numpy(np.array(array[chosen]))
    return maps.flip(2) if mirror else maps


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


def _depth_loss(
    model: nn.Module, image: Tensor, scenes: TeacherScenes, chosen: Indices, mirror: bool
) -> Tensor:
    predicted = model(image).predicted_depth.float().clamp_min(0.1)
    expected = truth(scenes.depth, chosen, mirror).float()
    error = (predicted.log() - expected.log()).abs()
    return (error * _emphasis(scenes, chosen, mirror)).mean()


def _emphasis(scenes: TeacherScenes, chosen: Indices, mirror: bool) -> Tensor:
    """Weights [B, S, S] of the pixels: solids are a seventh of them, and all the difficulty."""
    return 1.0 + SOLID_WEIGHT * (truth(scenes.classes, chosen, mirror) >= FIRST_SOLID)


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


def _normal_loss(
    model: nn.Module, image: Tensor, scenes: TeacherScenes, chosen: Indices, mirror: bool
) -> Tensor:
    expected = F.normalize(truth(scenes.normal, chosen, mirror).float().permute(0, 3, 1, 2), dim=1)
    if mirror:
        expected = expected * torch.tensor([-1.0, 1.0, 1.0]).view(1, 3, 1, 1)
    predicted = F.interpolate(model(image).normals.float(), SIZE, mode="bilinear")
    predicted = F.normalize(predicted, dim=1)
    # The distance between unit vectors grows with the angle itself, so that small errors count.
    error = (predicted - expected).square().sum(1).add(1e-5).sqrt()
    return (error * _emphasis(scenes, chosen, mirror)).mean()


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


def _semseg_loss(
    model: nn.Module, image: Tensor, scenes: TeacherScenes, chosen: Indices, mirror: bool
) -> Tensor:
    image = F.interpolate(image, SEMSEG_SIZE, mode="bilinear", antialias=True)
    logits = F.interpolate(model(image).logits.float(), SIZE, mode="bilinear")
    error = F.cross_entropy(
        logits, truth(scenes.classes, chosen, mirror).long(), reduction="none"
    )
    return (error * _emphasis(scenes, chosen, mirror)).mean()


TEACHERS = {
    "depth": DenseTeacher(_build_depth, _depth_loss),
    "normal": DenseTeacher(_build_normal, _normal_loss, lr=1.5e-3, muon="backbone.encoder"),
    "semseg": DenseTeacher(_build_semseg, _semseg_loss),
}


def train(
    name: str, scenes: TeacherScenes, folder: Path, minutes: float, *, resume: bool = False
) -> int:
    """Train a teacher and save it, weights in half precision.

    Args:
        name: A key of `TEACHERS`.
        scenes: What to learn from; its held-out part is not touched.
        folder: Where the network and its processor go.
        minutes: Wall time.
        resume: Whether to go on from the folder's weights, at half the learning rate.

    Returns:
        Number of scenes seen.
    """
    teacher = TEACHERS[name]
    torch.manual_seed(0)
    model, processor = teacher.build()
    if resume:
        kind: Any = type(model)
        model.load_state_dict(kind.from_pretrained(folder, dtype=torch.float32).state_dict())
    model = model.to(memory_format=torch.channels_last)

    def loss_of(batch: tuple[Indices, bool]) -> Tensor:
        return teacher.loss(model, pixels(scenes, *batch), scenes, *batch)

    steps = train_for(
        name,
        minutes,
        model.train(),
        loss_of,
        _batches(scenes.training, seed=int(resume)),
        lr=teacher.lr / 2 if resume else teacher.lr,
        is_hidden=lambda parameter: bool(teacher.muon) and parameter.startswith(teacher.muon),
    )
    save_half(model, folder)
    processor.save_pretrained(folder)
    return steps * BATCH


def _batches(count: int, seed: int) -> Iterator[tuple[Indices, bool]]:
    for number, chosen in enumerate(shuffled(count, BATCH, seed)):
        yield chosen, number % 2 == 1
