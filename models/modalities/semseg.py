"""Semantic segmentation: class ids uint8 [H, W], 255 = unlabelled, stored as 8-bit PNG."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image

from models.crops import CropBox
from models.modalities.base import Modality, crop_image, open_map, png

UNLABELLED = 255


def _palette() -> np.ndarray:
    # Golden-ratio hues: neighbouring ids get colours that are far apart.
    colours = [
        colorsys.hsv_to_rgb((i * 0.618034) % 1.0, 0.45 + 0.4 * (i % 3) / 2, 0.95 - 0.3 * (i % 2))
        for i in range(256)
    ]
    table = (np.array(colours) * 255).astype(np.uint8)
    table[UNLABELLED] = 0
    return table


PALETTE = _palette()


def _crop(value: np.ndarray, box: CropBox, size: int) -> np.ndarray:
    image = Image.fromarray(value)
    return np.asarray(crop_image(image, box, size, Image.Resampling.NEAREST))


MODALITY = Modality(
    name="semseg",
    kind="map",
    ext="png",
    encode=lambda value: png(np.ascontiguousarray(value, dtype=np.uint8)),
    decode=lambda data: np.asarray(open_map(data, "L", "P", "1"), dtype=np.uint8),
    crop=_crop,
    render=lambda value: PALETTE[value],
    description="uint8 [H, W] class ids, 255 = unlabelled",
)
