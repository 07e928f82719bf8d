"""Depth: float32 [H, W] in 0..1, stored as 16-bit PNG (value x 65535).

The unit belongs to the labeler: metres / 20 for scenes and other metric networks, relative
distance for networks that know no scale.
"""

from __future__ import annotations

import numpy as np

from models.modalities.base import Modality, crop_float, numbers, open_map, png


def _encode(value: np.ndarray) -> bytes:
    return png(np.rint(numbers(np.clip(value, 0, 1)) * 65535).astype(np.uint16))


def _decode(data: bytes) -> np.ndarray:
    return np.asarray(open_map(data, "I;16", "I"), dtype=np.float32) / 65535


_ROWS = 256  # of a map that are coloured at once: all of 64 megapixels would take gigabytes


def _render(value: np.ndarray) -> np.ndarray:
    low, high = np.percentile(value, (1, 99))
    out = np.empty((*value.shape, 3), np.uint8)
    for top in range(0, len(value), _ROWS):
        part = (value[top : top + _ROWS] - low) / max(float(high - low), 1e-6)
        out[top : top + _ROWS] = _coloured(np.clip(part, 0, 1)[..., None])
    return out


def _coloured(t: np.ndarray) -> np.ndarray:
    # Near is warm and bright, far is dark violet: three stops are enough to read the order.
    stops = np.array([[250, 210, 60], [200, 60, 90], [30, 15, 70]], np.float32)
    first = stops[0] * (1 - 2 * t) + stops[1] * 2 * t
    second = stops[1] * (2 - 2 * t) + stops[2] * (2 * t - 1)
    return np.where(t < 0.5, first, second).astype(np.uint8)


MODALITY = Modality(
    name="depth",
    kind="map",
    ext="png",
    encode=_encode,
    decode=_decode,
    crop=crop_float,
    render=_render,
    description="float32 [H, W] in 0..1; metres / 20 for metric labelers",
)
