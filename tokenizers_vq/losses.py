"""Reconstruction losses, one function per kind of value; all return a scalar.

Shapes: B batch, C channels, H, W pixels. Predictions are float32 [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

UNLABELLED = 255
"""Class id that no loss or metric counts."""


def gradient_difference(pred: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of the horizontal and vertical differences."""
    error = pred - target
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def _misalignment(pred: Tensor, target: Tensor) -> Tensor:
    """One minus cosine over channels; written out, as the library's takes 20 times as long."""
    product = (pred * target).sum(1)
    norms = (pred.square().sum(1) * target.square().sum(1) + 1e-6).sqrt()
    return 1 - (product / norms).mean()


def rgb_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Squared error against blur traded with L1, plus sharp edges; values in [-1, 1]."""
    return F.l1_loss(pred, target) + 2 * F.mse_loss(pred, target)


def depth_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Nearly L1 in normalised log depth: 0.02 of [-1, 1] is 5 % of distance."""
    return 5 * F.smooth_l1_loss(pred, target, beta=0.02) + gradient_difference(pred, target)


def normal_loss(pred: Tensor, target: Tensor) -> Tensor:
    """L1 plus one minus cosine; targets are unit vectors."""
    return F.l1_loss(pred, target) + _misalignment(pred, target)


def class_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of logits [B, K, H, W] against ids [B, H, W]; 255 is ignored."""
    return F.cross_entropy(pred, target.long(), ignore_index=UNLABELLED)


def feature_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 plus one minus cosine of standardised features."""
    return F.smooth_l1_loss(pred, target) + _misalignment(pred, target)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rgb": rgb_loss,
    "depth": depth_loss,
    "normal": normal_loss,
    "semseg": class_loss,
    "feature": feature_loss,
}
