"""Reconstruction losses: one function per kind of value, the plain ones by name, and perceptual.

All return a scalar. Shapes: B batch, C channels, H, W pixels. Predictions are float32 [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def edge_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 of edges in [-1, 1], which are thin: most pixels are right for nothing."""
    return F.smooth_l1_loss(pred, target) + gradient_difference(pred, target)


def mask_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy of logits against masks in 0..1."""
    return F.binary_cross_entropy_with_logits(pred, target)


Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "rgb": rgb_loss,
    "depth": depth_loss,
    "normal": normal_loss,
    "semseg": class_loss,
    "feature": feature_loss,
    "vector": feature_loss,
    "edge": edge_loss,
    "mask": mask_loss,
}
"""What a kind of value is trained with unless a recipe names another."""

NAMED: dict[str, Loss] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "cosine": _misalignment,
    "cross_entropy": class_loss,
    "bce": mask_loss,
}
"""Losses of the released recipes."""


def reconstruction_loss(kind: str, name: str = "") -> Loss:
    """The loss of that name, or the kind's own.

    Raises:
        ValueError: if there is none, or it takes other values: ids go with `cross_entropy` only,
            masks with `bce`, `mse`, `l1` or `smooth_l1`.
    """
    if not name:
        return LOSSES[kind]
    if name not in NAMED:
        raise ValueError(f"loss={name!r}: choose one of {', '.join(NAMED)}")
    if (kind == "semseg") != (name == "cross_entropy") or (name == "bce" and kind != "mask"):
        raise ValueError(f"loss={name!r} does not fit {kind} values")
    return NAMED[name]


class Perceptual(nn.Module):
    """Distance between the features that a frozen timm network sees in two pictures.

    Args:
        model: Name of a timm model, or a network with `forward_intermediates`.
        blocks: Whose outputs are compared.
        distance: `cosine` is one minus the cosine over channels, `l1` the mean difference.
        size: Side in px to which pictures are resized for the network.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: str | nn.Module, blocks: Sequence[int] = (2, 5, 8, 11),
        distance: Literal["cosine", "l1"] = "cosine", size: int = 224,
    ) -> None:
        super().__init__()
        if distance not in ("cosine", "l1"):
            raise ValueError(f"distance={distance!r}: choose 'cosine' or 'l1'")
        if isinstance(model, str):
            import timm

            model = timm.create_model(model, pretrained=True)
        self.network: Any = model.eval().requires_grad_(False)
        self.blocks, self.distance, self.size = list(blocks), distance, size
        config = getattr(model, "pretrained_cfg", None) or {}
        for name, default in (("mean", (0.5,) * 3), ("std", (0.5,) * 3)):
            values = torch.tensor(config.get(name) or default).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Mean distance of pictures [B, 3, H, W] in [-1, 1]; gradients reach `pred` only."""
        ours = self._features(pred)
        with torch.no_grad():
            theirs = self._features(target)
        compare = _misalignment if self.distance == "cosine" else F.l1_loss
        return torch.stack([compare(a, b) for a, b in zip(ours, theirs, strict=True)]).mean()

    def train(self, mode: bool = True) -> Perceptual:
        """Stays in evaluation mode."""
        return super().train(False)

    def _features(self, x: Tensor) -> list[Tensor]:
        if x.shape[-1] != self.size or x.shape[-2] != self.size:
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True)
        x = ((x + 1) / 2 - self.mean) / self.std
        return self.network.forward_intermediates(
            x, indices=self.blocks, intermediates_only=True
        )


class Lpips(nn.Module):
    """LPIPS (Zhang et al., arXiv 1801.03924): distance of pictures as people judge it.

    Args:
        network: `alex`, `vgg` or `squeeze`; its weights come from torchvision.
    """

    def __init__(self, network: str) -> None:
        super().__init__()
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self.network: Any = LearnedPerceptualImagePatchSimilarity(network).net  # type: ignore[arg-type]
        self.network.eval().requires_grad_(False)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Mean distance of pictures [B, 3, H, W] in [-1, 1]; gradients reach both."""
        return self.network(pred, target).mean()


def perceptual_network(name: str) -> nn.Module:
    """The distance of that name: `lpips:vgg`, `lpips:alex`, `lpips:squeeze`, or a timm model.

    Raises:
        ValueError: if LPIPS has no such network.
    """
    kind, _, network = name.partition(":")
    if kind != "lpips":
        return Perceptual(name)
    if network not in ("alex", "vgg", "squeeze"):
        raise ValueError(f"perceptual_model={name!r}: choose lpips:alex, lpips:vgg or "
                         "lpips:squeeze")
    return Lpips(network)
