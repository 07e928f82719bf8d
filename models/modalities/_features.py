"""What feature modalities share: float16 arrays in `.npy` files, grids and whole-image vectors."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from infra.strict import read_npy
from models.crops import CropBox
from models.modalities.base import Modality, numbers

GLOBAL_TOKENS = 16
"""Tokens of a vector, as many as in the released models."""


def encode(value: np.ndarray) -> bytes:
    """An array as the bytes of a float16 `.npy` file; what float16 cannot hold is refused."""
    buffer = io.BytesIO()
    with np.errstate(over="ignore"):  # numbers() tells of it
        half = np.ascontiguousarray(value, dtype=np.float16)
    np.save(buffer, numbers(half), allow_pickle=False)
    return buffer.getvalue()


def decode(data: bytes, sides: int) -> np.ndarray:
    """The array of a `.npy` file, of so many dimensions.

    Raises:
        ValueError: as of pickled objects, of whole numbers, or of such as are not finite.
    """
    value = read_npy(data)
    if value.dtype.kind != "f" or value.ndim != sides or not value.size:
        raise ValueError(f"floats of {sides} dimensions, not {value.dtype} {list(value.shape)}")
    return numbers(value)


def grid(name: str, description: str) -> Modality:
    """A modality of feature maps float16 [h, w, C] that cover the whole image."""
    return Modality(
        name=name, kind="feature", ext="npy", encode=encode,
        decode=lambda data: decode(data, 3), crop=_crop_grid, render=_render_grid,
        description=description, tokenizer={"kind": "feature"},
    )  # fmt: skip


def vector(name: str, description: str) -> Modality:
    """A modality of one vector float16 [C] an image.

    Every crop keeps the vector of the whole image: which picture it is does not change.
    """
    return Modality(
        name=name, kind="vector", ext="npy", encode=encode,
        decode=lambda data: decode(data, 1),
        crop=lambda value, box, size: value, render=render_rows, description=description,
        tokenizer={"kind": "vector", "groups": GLOBAL_TOKENS, "levels": (7, 5, 5, 5, 5)},
    )  # fmt: skip


def _axis(start: float, length: float, cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bilinear taps of ``cells`` centres spread over a window of an axis of ``cells`` cells."""
    centre = (start + length * (np.arange(cells) + 0.5) / cells) * cells - 0.5
    centre = np.clip(centre, 0, cells - 1)
    low = np.floor(centre).astype(int)
    return low, np.minimum(low + 1, cells - 1), (centre - low).astype(np.float32)


def _crop_grid(value: np.ndarray, box: CropBox, size: int) -> np.ndarray:
    """The window on the grid itself; the grid keeps its shape, so ``size`` plays no part."""
    height, width, _ = value.shape
    y0, y1, fy = _axis(box.top, box.height, height)
    x0, x1, fx = _axis(box.left, box.width, width)
    full = value.astype(np.float32)
    rows = full[y0] * (1 - fy)[:, None, None] + full[y1] * fy[:, None, None]
    out = rows[:, x0] * (1 - fx)[None, :, None] + rows[:, x1] * fx[None, :, None]
    return (out[:, ::-1] if box.hflip else out).astype(np.float16)


def _render_grid(value: np.ndarray) -> np.ndarray:
    """The three leading principal components of this map as colours."""
    return render_alike([value])[0]


def render_alike(maps: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Maps [h, w, C] as pictures in which like features have like colours: the three leading
    principal components of them all."""
    height, width, channels = maps[0].shape
    flat = np.stack(maps).reshape(-1, channels).astype(np.float32)
    flat = flat - flat.mean(0)
    _, axes = np.linalg.eigh(flat.T @ flat)
    parts = flat @ axes[:, -3:]
    low, high = np.percentile(parts, (1, 99), axis=0)
    shades = np.clip((parts - low) / np.maximum(high - low, 1e-6), 0, 1)
    pictures = (shades.reshape(len(maps), height, width, -1) * 255).astype(np.uint8)
    scale = max(1, 128 // height)
    return list(pictures.repeat(scale, 1).repeat(scale, 2))


def render_rows(value: np.ndarray) -> np.ndarray:
    """Numbers as a square of 128 px, row by row: orange above zero, blue below."""
    flat = np.nan_to_num(np.asarray(value, np.float32)).ravel()
    side = int(np.ceil(np.sqrt(max(1, flat.size))))
    cells = np.zeros(side * side, np.float32)
    cells[: flat.size] = flat / max(float(np.abs(flat).max(initial=0.0)), 1e-6)
    strength = cells.reshape(side, side, 1)
    ends = np.where(strength > 0, np.array([250, 140, 20.0]), np.array([30, 110, 250.0]))
    picture = (ends * np.abs(strength) + 25 * (1 - np.abs(strength))).astype(np.uint8)
    where = np.arange(128) * side // 128
    return picture[where][:, where]
