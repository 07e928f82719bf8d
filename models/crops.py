"""Augmentation crops as a pure function of (sample key, crop index).

No crop file is stored: every modality of a sample computes the same window from the same key, so
they agree by construction. Crop 0 is the largest centred square, unflipped; the others follow
RandomResizedCrop (Szegedy et al. 2015; scale >= ``min_scale``, aspect ratio 3/4 to 4/3), as the
released 4M token sets do.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

_RATIO = (3 / 4, 4 / 3)
_TRIES = 10


@dataclass(frozen=True)
class CropBox:
    """A window of an image in fractions of its height and width (0..1)."""

    top: float
    left: float
    height: float
    width: float
    hflip: bool = False

    def pixels(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The window as (left, upper, right, lower) in pixels of a height x width image."""
        return (
            self.left * width,
            self.top * height,
            min((self.left + self.width) * width, float(width)),
            min((self.top + self.height) * height, float(height)),
        )


@dataclass(frozen=True, kw_only=True)
class CropPolicy:
    """Which crops a token set holds."""

    num_crops: int = 4
    """Crops per sample; crop 0 is the centre crop."""
    min_scale: float = 0.8
    """Least share of the image's area that a random crop covers."""
    hflip: bool = False
    """Flip random crops with probability one half (captions with 'left of' forbid it)."""
    size: int = 128
    """Side of the square crop in pixels."""

    def __post_init__(self) -> None:
        if self.num_crops < 1:
            raise ValueError(f"num_crops must be at least 1, got {self.num_crops}")
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"min_scale must be in (0, 1], got {self.min_scale}")
        if self.size < 1:
            raise ValueError(f"size must be a positive number of pixels, got {self.size}")


def crop_box(policy: CropPolicy, key: str, index: int, aspect: float = 1.0) -> CropBox:
    """Window ``index`` of sample ``key``.

    Args:
        policy: number, least scale and flipping of crops.
        key: the sample's key.
        index: 0 (centre) to ``policy.num_crops - 1``.
        aspect: width / height of the full image.

    Raises:
        ValueError: when ``index`` is outside the policy.
    """
    if not 0 <= index < policy.num_crops:
        raise ValueError(f"crop {index} does not exist: the policy has {policy.num_crops} crops")
    if index == 0:
        return _centre(aspect)
    digest = hashlib.sha256(f"{key}:{index}".encode()).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "big")))
    flip = policy.hflip and bool(rng.random() < 0.5)
    for _ in range(_TRIES):
        area = rng.uniform(policy.min_scale, 1.0)
        ratio = math.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        width = math.sqrt(area * ratio / aspect)
        height = math.sqrt(area * aspect / ratio)
        if width <= 1 and height <= 1:
            top, left = rng.uniform(0, 1 - height), rng.uniform(0, 1 - width)
            return CropBox(float(top), float(left), height, width, flip)
    box = _centre(aspect)
    return CropBox(box.top, box.left, box.height, box.width, flip)


def _centre(aspect: float) -> CropBox:
    width, height = min(1.0, 1 / aspect), min(1.0, aspect)
    return CropBox((1 - height) / 2, (1 - width) / 2, height, width)
