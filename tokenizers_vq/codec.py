"""The value contract: what a modality's numbers mean to a tokenizer's network, and back.

A codec is stored with its tokenizer, so decoded values come out in the unit that went in. Three
forms of a value occur, N samples of H x W:

    value    what `models.modalities` decodes: float depth in 0..1, unit normals, ids, uint8 RGB
    packed   the smallest array that keeps it (float16 depth, int8 normals), for caches
    tensor   what the network eats: float32 [N, C, H, W] around [-1, 1], or ids uint8 [N, H, W]

Edges are uint8 [H, W]; masks lie in 0..1 [H, W] and decode to 0 or 1; a vector [C] is a feature
map of a single cell.

Numbers of the released tokenizers: RGB and normals in [-1, 1] (not ImageNet statistics), depth by
truncated standardisation; depth in metric units keeps its scale under `log` instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Kind = Literal["rgb", "depth", "normal", "semseg", "feature", "vector", "edge", "mask"]
Values = Sequence[NDArray[Any]] | NDArray[Any]

_TRUNCATED = 0.1
_EPS = 1e-6
_SLACK = 1e-3  # what resizing adds to the largest number of a map


@dataclass(frozen=True, kw_only=True)
class ValueCodec:
    """How one modality's values become tensors."""

    kind: Kind
    """Which value type."""
    depth_mode: Literal["log", "standardise"] = "log"
    """`log`: log of [near, 1] to [-1, 1]; `standardise`: each map to zero mean, unit variance."""
    near: float = 0.01
    """Least depth that `log` tells apart, as a share of the largest."""
    mean: tuple[float, ...] = ()
    """Mean of each feature channel."""
    std: tuple[float, ...] = ()
    """Standard deviation of each feature channel."""
    class_offset: int = 0
    """Added to class ids; with 1, unlabelled pixels (255) become class 0."""

    def __post_init__(self) -> None:
        if self.kind not in _PACK:
            raise ValueError(f"kind={self.kind!r}: choose one of {', '.join(_PACK)}")
        if self.depth_mode not in ("log", "standardise"):
            raise ValueError(f"depth_mode={self.depth_mode!r}: choose 'log' or 'standardise'")
        if not 0 < self.near < 1:
            raise ValueError(f"near={self.near} must lie between 0 and 1")
        if self.kind in _CHANNELS_LAST and not len(self.mean) == len(self.std) > 0:
            raise ValueError(f"a {self.kind} codec needs mean and std of every channel")
        if self.class_offset not in (0, 1):
            raise ValueError(f"class_offset={self.class_offset} must be 0 or 1")

    def to_dict(self) -> dict[str, Any]:
        """The codec as JSON-ready values."""
        fields = {**asdict(self), "mean": list(self.mean), "std": list(self.std)}
        if not self.class_offset:  # younger than stored tokenizers, whose bytes must not change
            del fields["class_offset"]
        return fields

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ValueCodec:
        """The inverse of `to_dict`."""
        return cls(**{**data, "mean": tuple(data["mean"]), "std": tuple(data["std"])})

    def check(self, value: NDArray[Any]) -> None:
        """Raises ValueError for a value of another shape than the contract's, or of other numbers:
        whole ones where it wants floats, infinite ones, or such as would be clipped."""
        shape, found = _SHAPES[self.kind], np.asarray(value)
        sides = [len(self.mean) if side == "C" else side for side in shape]
        fits = found.ndim == len(sides) and all(
            isinstance(side, str) or side == size
            for side, size in zip(sides, found.shape, strict=True)
        )
        floats = self.kind in _FLOATS
        if not fits or (floats and found.dtype.kind != "f"):
            kind = "floats" if floats else "values"
            raise ValueError(f"takes {kind} [{', '.join(map(str, sides))}], not {found.dtype} "
                             f"{list(found.shape)}")  # fmt: skip
        if floats and not np.isfinite(found).all():
            raise ValueError("takes finite numbers, but some are none")
        low, high = self._bounds()
        if found.size and not low - _SLACK <= found.min() <= found.max() <= high + _SLACK:
            raise ValueError(f"takes numbers in {low:g}..{high:g}, not in {found.min():g}.."
                             f"{found.max():g}")  # fmt: skip

    def _bounds(self) -> tuple[float, float]:
        """Between which numbers values lie; standardised depth may be in any unit, as far as it
        can be packed."""
        if self.kind == "normal":
            return -1.0, 1.0
        if self.kind == "depth" and self.depth_mode == "log":
            return 0.0, 1.0
        most = float(np.finfo(np.float16).max) if self.kind in ("depth", "feature") else math.inf
        return -most, most

    def pack(self, value: NDArray[Any]) -> NDArray[Any]:
        """One value [H, W(, C)] in its smallest form."""
        return pack_value(self.kind, value)

    def to_tensor(self, packed: NDArray[Any], device: torch.device | str = "cpu") -> Tensor:
        """Packed values [N, H, W(, C)] to a tensor [N, C, H, W], or ids [N, H, W], on a device: to
        it they travel packed, and are widened there."""
        tensor = torch.from_numpy(np.ascontiguousarray(packed)).to(device)
        match self.kind:
            case "rgb":
                return tensor.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
            case "normal":
                return F.normalize(tensor.permute(0, 3, 1, 2).float(), dim=1)
            case "depth":
                return self._depth(tensor.float())[:, None]
            case "semseg":
                return tensor + self.class_offset  # 255 + 1 wraps to 0
            case "edge":
                return tensor[:, None].float().div_(127.5).sub_(1)
            case "mask":
                return tensor[:, None].float() / 255
        mean, std = (torch.tensor(each, device=device) for each in (self.mean, self.std))
        scaled = (tensor.float() - mean) / std
        return scaled[:, :, None, None] if self.kind == "vector" else scaled.permute(0, 3, 1, 2)

    def from_tensor(self, output: Tensor) -> list[NDArray[Any]]:
        """Network output [N, C, H, W] to values, in the types of the modality table."""
        output = output.detach().float().cpu()
        match self.kind:
            case "rgb":
                pixels = ((output + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
                return list(pixels.permute(0, 2, 3, 1).numpy())
            case "normal":
                return list(F.normalize(output, dim=1).permute(0, 2, 3, 1).numpy())
            case "depth":
                return list(self._distance(output[:, 0]).numpy())
            case "semseg":
                return list((output.argmax(1).to(torch.uint8) - self.class_offset).numpy())
            case "edge":
                pixels = ((output[:, 0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
                return list(pixels.numpy())
            case "mask":
                return list((output[:, 0] > 0).to(torch.uint8).numpy())
        features = output.permute(0, 2, 3, 1) * torch.tensor(self.std) + torch.tensor(self.mean)
        return list((features[:, 0, 0] if self.kind == "vector" else features).numpy())

    def _depth(self, depth: Tensor) -> Tensor:
        if self.depth_mode == "log":
            return depth.clamp(self.near, 1).log() / -math.log(self.near) * 2 + 1
        flat = depth.flatten(1).sort(dim=1).values
        cut = int(flat.shape[1] * _TRUNCATED)
        kept = flat[:, cut : flat.shape[1] - cut]
        mean, var = kept.mean(1), kept.var(1)
        return (depth - mean[:, None, None]) / (var[:, None, None] + _EPS).sqrt()

    def _distance(self, output: Tensor) -> Tensor:
        if self.depth_mode == "log":
            return ((output.clamp(-1, 1) - 1) / 2 * -math.log(self.near)).exp()
        # The scale is gone by construction; what is left is the order, stretched over 0..1.
        low, high = output.amin((1, 2), keepdim=True), output.amax((1, 2), keepdim=True)
        return (output - low) / (high - low).clamp(min=_EPS)


def _pack_bytes(value: NDArray[Any]) -> NDArray[Any]:
    if value.dtype == np.uint8:
        return value
    if value.dtype.kind == "f" or (value.size and not 0 <= value.min() <= value.max() <= 255):
        raise ValueError(f"values must be whole numbers in 0..255, not {value.dtype} in "
                         f"{value.min()}..{value.max()}")
    return value.astype(np.uint8)


def _pack_depth(value: NDArray[Any]) -> NDArray[Any]:
    return value.astype(np.float16)


def _pack_normal(value: NDArray[Any]) -> NDArray[Any]:
    return np.rint(np.clip(value, -1, 1) * 127).astype(np.int8)


def _pack_feature(value: NDArray[Any]) -> NDArray[Any]:
    return value.astype(np.float16, copy=False)


def _pack_vector(value: NDArray[Any]) -> NDArray[Any]:
    return value.astype(np.float32, copy=False)


def _pack_mask(value: NDArray[Any]) -> NDArray[Any]:
    return np.rint(np.clip(value.astype(np.float32), 0, 1) * 255).astype(np.uint8)


_CHANNELS_LAST = ("feature", "vector")
_FLOATS = ("depth", "normal", *_CHANNELS_LAST)
_SHAPES: dict[str, tuple[str | int, ...]] = {
    "rgb": ("H", "W", 3), "depth": ("H", "W"), "normal": ("H", "W", 3), "semseg": ("H", "W"),
    "feature": ("H", "W", "C"), "vector": ("C",), "edge": ("H", "W"), "mask": ("H", "W"),
}  # fmt: skip
_PACK = {
    "rgb": _pack_bytes,
    "depth": _pack_depth,
    "normal": _pack_normal,
    "semseg": _pack_bytes,
    "feature": _pack_feature,
    "vector": _pack_vector,
    "edge": _pack_bytes,
    "mask": _pack_mask,
}


def pack_value(kind: Kind, value: NDArray[Any]) -> NDArray[Any]:
    """One value [H, W(, C)] in its smallest form. Raises ValueError for colours, classes or edges
    that are not whole numbers in 0..255."""
    return _PACK[kind](np.asarray(value))


def feature_statistics(features: Values) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over feature maps [h, w, C].

    Maps are widened one at a time: all of them as float32 would take twice the memory that they do,
    and a float32 sum over millions of cells forgets the small ones.
    """
    def cells() -> Iterator[NDArray[np.float64]]:
        return (np.asarray(each, np.float64).reshape(-1, each.shape[-1]) for each in features)

    count = sum(len(each) for each in cells())
    none = np.zeros(())
    mean = sum((each.sum(0) for each in cells()), none) / count
    std = np.sqrt(sum((np.square(each - mean).sum(0) for each in cells()), none) / count)
    return tuple(mean.tolist()), tuple(np.maximum(std, 1e-4).tolist())
