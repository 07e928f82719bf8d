"""CLIP patch features: float16 [h, w, C], the vision tower's last hidden state without CLS."""

from __future__ import annotations

import io

import numpy as np

from models.crops import CropBox
from models.modalities.base import Modality


def _encode(value: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(value, dtype=np.float16), allow_pickle=False)
    return buffer.getvalue()


def _decode(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


def _axis(start: float, length: float, cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bilinear taps of ``cells`` centres spread over a window of an axis of ``cells`` cells."""
    centre = (start + length * (np.arange(cells) + 0.5) / cells) * cells - 0.5
    centre = np.clip(centre, 0, cells - 1)
    low = np.floor(centre).astype(int)
    return low, np.minimum(low + 1, cells - 1), (centre - low).astype(np.float32)


def _crop(value: np.ndarray, box: CropBox, size: int) -> np.ndarray:
    """The window on the grid itself; the grid keeps its shape, so ``size`` plays no part."""
    height, width, _ = value.shape
    y0, y1, fy = _axis(box.top, box.height, height)
    x0, x1, fx = _axis(box.left, box.width, width)
    full = value.astype(np.float32)
    rows = full[y0] * (1 - fy)[:, None, None] + full[y1] * fy[:, None, None]
    out = rows[:, x0] * (1 - fx)[None, :, None] + rows[:, x1] * fx[None, :, None]
    return (out[:, ::-1] if box.hflip else out).astype(np.float16)


def _render(value: np.ndarray) -> np.ndarray:
    """The three leading principal components of this map as colours."""
    height, width, channels = value.shape
    flat = value.reshape(-1, channels).astype(np.float32)
    flat = flat - flat.mean(0)
    _, _, axes = np.linalg.svd(flat, full_matrices=False)
    parts = flat @ axes[:3].T
    parts = (parts - parts.min(0)) / np.maximum(np.ptp(parts, axis=0), 1e-6)
    picture = (parts.reshape(height, width, -1) * 255).astype(np.uint8)
    scale = max(1, 128 // height)
    return picture.repeat(scale, 0).repeat(scale, 1)


MODALITY = Modality(
    name="clip",
    kind="feature",
    ext="npy",
    encode=_encode,
    decode=_decode,
    crop=_crop,
    render=_render,
    description="float16 [h, w, C] patch features",
)
