"""Surface normals: unit vectors float32 [H, W, 3] in camera space (x right, y up, z to the viewer).

Stored as 8-bit RGB PNG, (n + 1) / 2 x 255, the usual tangent-map colours.
"""

from __future__ import annotations

import numpy as np

from models.crops import CropBox
from models.modalities.base import Modality, crop_float, numbers, open_map, png


def normalise(value: np.ndarray) -> np.ndarray:
    """Rescales vectors [..., 3] to unit length."""
    return value / np.maximum(np.linalg.norm(value, axis=-1, keepdims=True), 1e-6)


def _picture(value: np.ndarray) -> np.ndarray:
    return np.rint((np.clip(value, -1, 1) + 1) * 127.5).astype(np.uint8)


def _decode(data: bytes) -> np.ndarray:
    raw = np.asarray(open_map(data, "RGB"), dtype=np.float32)
    return normalise(raw / 127.5 - 1).astype(np.float32)


def _crop(value: np.ndarray, box: CropBox, size: int) -> np.ndarray:
    out = np.stack([crop_float(value[..., i], box, size) for i in range(3)], axis=-1)
    if box.hflip:  # a mirrored surface looks the other way along x
        out[..., 0] *= -1
    return normalise(out)


MODALITY = Modality(
    name="normal",
    kind="map",
    ext="png",
    encode=lambda value: png(_picture(numbers(value))),
    decode=_decode,
    crop=_crop,
    render=_picture,
    description="unit float32 [H, W, 3]; x right, y up, z to the viewer",
)
