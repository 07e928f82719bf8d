"""Canny edges (Canny 1986, with the 3 x 3 Sobel gradient that is customary), computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.labelers.base import Image, Labeler, LabelerSpec, options_of

_TAN = float(np.tan(np.pi / 8))


class CannyLabeler(Labeler):
    """Writes "canny_edge": uint8 [H, W], 255 on an edge and 0 elsewhere.

    The gradient is that of grey, |gx| + |gy| of the Sobel kernel on 0..255.

    Options:
        low: Gradient from which a pixel continues an edge (100).
        high: Gradient from which a pixel begins one (200).
        sigma: Standard deviation in pixels of the blur before it; 0 is none (0).
    """

    def __init__(self, spec: LabelerSpec) -> None:
        super().__init__(spec)
        options = options_of(spec, low=100, high=200, sigma=0.0)
        self.low, self.high, self.sigma = (float(options[n]) for n in ("low", "high", "sigma"))
        if not 0 < self.low <= self.high or self.sigma < 0:
            raise ValueError(
                f"low={self.low}, high={self.high}, sigma={self.sigma} of Canny edges: "
                "take 0 < low <= high and sigma >= 0"
            )

    def predict(self, images: Sequence[Image]) -> dict[str, list[Any]]:
        found = canny(grey(np.stack(images)), self.low, self.high, self.sigma)
        return {"canny_edge": list(found.astype(np.uint8) * 255)}


def grey(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Luma (ITU-R BT.601) float32 [..., H, W] of RGB uint8 [..., H, W, 3], whole numbers."""
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    return np.rint(images.astype(np.float32) @ weights)


def canny(
    images: NDArray[np.float32], low: float, high: float, sigma: float = 0.0
) -> NDArray[np.bool_]:
    """Edges of grey images float32 [B, H, W], all at once."""
    from scipy.ndimage import gaussian_filter, label

    if sigma:
        images = gaussian_filter(images, (0, sigma, sigma), mode="nearest")
    dx, dy = sobel(images)
    size = np.abs(dx) + np.abs(dy)
    weak = ridges(size, dx, dy) & (size > low)
    touching = np.zeros((3, 3, 3), bool)
    touching[1] = True  # edges run on in eight directions, and never into the next image
    pieces, count = label(weak, touching)
    strong = np.zeros(count + 1, bool)
    strong[pieces[weak & (size > high)]] = True
    strong[0] = False
    return strong[pieces]


def sobel(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Horizontal and vertical Sobel gradients [B, H, W], the border repeated."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), mode="edge")
    across = padded[:, :, 2:] - padded[:, :, :-2]
    along = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    dx = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]
    return dx, along[:, 2:] - along[:, :-2]


def ridges(
    size: NDArray[np.float32], dx: NDArray[np.float32], dy: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """Where a gradient [B, H, W] is no smaller than both of its neighbours along its direction.

    Directions are told apart in steps of 45 degrees; of two equal neighbours the first is kept.
    """
    padded = np.pad(size, ((0, 0), (1, 1), (1, 1)))
    height, width = size.shape[1:]

    def shifted(down: int, right: int) -> NDArray[np.float32]:
        return padded[:, 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    flat, steep = np.abs(dy) < _TAN * np.abs(dx), np.abs(dx) < _TAN * np.abs(dy)
    falling = ~flat & ~steep & (np.sign(dx) == np.sign(dy))
    rising = ~flat & ~steep & ~falling
    out = np.zeros(size.shape, bool)
    for where, (down, right) in (
        (flat, (0, 1)), (steep, (1, 0)), (falling, (1, 1)), (rising, (1, -1)),
    ):  # fmt: skip
        out |= where & (size > shifted(-down, -right)) & (size >= shifted(down, right))
    return out
