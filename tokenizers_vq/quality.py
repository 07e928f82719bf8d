"""What a reconstruction is worth, in the unit of its task instead of the training loss.

Every function takes a predicted and a true value of the modality table and returns sums, so that
results add up over any number of samples: `{"name": (sum, weight)}`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenizers_vq.codec import Kind
from tokenizers_vq.losses import UNLABELLED

if TYPE_CHECKING:
    from torch import Tensor, nn

Array = NDArray[Any]
Sums = dict[str, tuple[float, float]]

_EPS = 1e-6
_NEAREST = 0.01  # depth that nearer ones count as: relative errors beside 0 have no bound
_BATCH = 32
_LPIPS_LEAST = 64  # px a side below which its network has nothing left to compare


def _rgb(pred: Array, true: Array) -> Sums:
    error = (pred.astype(np.float32) - true.astype(np.float32)) / 255
    return {"psnr": (-10 * float(np.log10(max(float((error**2).mean()), 1e-10))), 1)}


def _depth(pred: Array, true: Array) -> Sums:
    true, pred = np.maximum(true, _NEAREST), np.maximum(pred, _NEAREST)
    ratio = np.maximum(pred / true, true / pred)
    return {
        "abs_rel": (float((np.abs(pred - true) / true).sum()), true.size),
        "delta1": (float((ratio < 1.25).sum()), true.size),
    }


def _normal(pred: Array, true: Array) -> Sums:
    cosine = np.clip((pred * true).sum(-1), -1, 1)
    return {"mean_angle": (float(np.degrees(np.arccos(cosine)).sum()), cosine.size)}


def _semseg(pred: Array, true: Array) -> Sums:
    known = true != UNLABELLED
    pred, true = pred[known], true[known]
    sums: Sums = {}
    for label in np.setdiff1d(np.union1d(pred, true), UNLABELLED):  # which is wrong, but no class
        ours, theirs = pred == label, true == label
        sums[f"iou_{label}"] = (float((ours & theirs).sum()), float((ours | theirs).sum()))
    return sums


def _feature(pred: Array, true: Array) -> Sums:
    pred, true = pred.astype(np.float32), true.astype(np.float32)
    norms = np.linalg.norm(pred, axis=-1) * np.linalg.norm(true, axis=-1)
    cosine = (pred * true).sum(-1) / np.maximum(norms, _EPS)
    return {"cosine": (float(cosine.sum()), cosine.size)}


def _mask(pred: Array, true: Array) -> Sums:
    ours, theirs = pred > 0, true >= 0.5
    return {"iou": (float((ours & theirs).sum()), float((ours | theirs).sum()))}


_MEASURES = {
    "rgb": _rgb,
    "depth": _depth,
    "normal": _normal,
    "semseg": _semseg,
    "feature": _feature,
    "vector": _feature,
    "edge": _rgb,
    "mask": _mask,
}


def picture_quality(
    preds: Sequence[Array], trues: Sequence[Array], perceptual: nn.Module | None = None
) -> dict[str, float]:
    """How alike pictures uint8 [H, W, 3] or [H, W] look.

    Args:
        preds: Reconstructions.
        trues: What they should be, of one size.
        perceptual: Compares pictures [B, 3, H, W] in [-1, 1], such as `losses.Perceptual`.

    Returns:
        `ssim`; `lpips` (AlexNet) where the weights of that network are on this machine, as
        nothing is downloaded for a figure; `perceptual` of the given network.
    """
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    totals: dict[str, float] = {}
    lpips = _lpips()
    for start in range(0, len(trues), _BATCH):
        given = slice(start, start + _BATCH)
        pred, true = (_pictures(values[given]) for values in (preds, trues))
        with torch.inference_mode():
            found: dict[str, Any] = {"ssim": ssim(pred, true, data_range=2.0)}
            if lpips is not None and min(true.shape[-2:]) >= _LPIPS_LEAST:
                found["lpips"] = lpips(pred, true)
            if perceptual is not None:
                device = next(perceptual.parameters()).device
                found["perceptual"] = perceptual(pred.to(device), true.to(device))
        for name, value in found.items():
            totals[name] = totals.get(name, 0.0) + float(value) * len(true)
    return {name: total / len(trues) for name, total in totals.items()}


def _pictures(values: Sequence[Array]) -> Tensor:
    """Pictures as float32 [B, 3, H, W] in [-1, 1]."""
    import torch

    stacked = torch.from_numpy(np.stack(values)).float() / 127.5 - 1
    if stacked.dim() == 3:
        return stacked[:, None].expand(-1, 3, -1, -1)
    return stacked.permute(0, 3, 1, 2)


def _lpips() -> Callable[[Tensor, Tensor], Tensor] | None:
    """LPIPS if the weights of its network lie in torch's cache."""
    import torch

    # Looked up by torchvision's file name without importing it, which takes seconds.
    if not any((Path(torch.hub.get_dir()) / "checkpoints").glob("alexnet-owt-*.pth")):
        return None
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity("alex")


def reconstruction_quality(
    kind: Kind, preds: Iterable[Array], trues: Iterable[Array]
) -> dict[str, float]:
    """Task metrics of reconstructions against the values that were encoded.

    Returns:
        rgb and edge: `psnr` in dB; depth: `abs_rel`, `delta1`; normal: `mean_angle` in degrees;
        semseg: `miou` over the classes that occur; feature and vector: `cosine`; mask: `iou`.
    """
    totals: dict[str, tuple[float, float]] = {}
    for pred, true in zip(preds, trues, strict=True):
        for name, (value, weight) in _MEASURES[kind](pred, true).items():
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + value, before[1] + weight)
    means = {name: value / weight for name, (value, weight) in totals.items() if weight}
    if kind == "semseg":
        return {"miou": float(np.mean(list(means.values()))) if means else 0.0}
    return means
