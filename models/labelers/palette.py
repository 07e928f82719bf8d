"""Colour palettes by k-means, computed: no network."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from models.labelers.base import Image, Labeler, LabelerSpec, options_of
from models.modalities.color_palette import MAX_COLORS


class PaletteLabeler(Labeler):
    """Writes "color_palette": palettes of 1 to 7 colours of each image.

    Options:
        grid: Pixels on a side of the even grid that is looked at (64); smaller images are looked
            at whole.
        iterations: Most rounds of k-means for each palette (20).
    """

    def __init__(self, spec: LabelerSpec) -> None:
        super().__init__(spec)
        options = options_of(spec, grid=64, iterations=20)
        for name, value in options.items():
            if value < 1:
                raise ValueError(f"{name}={value} of a palette is below 1")
        self.grid, self.iterations = options["grid"], options["iterations"]

    def seen(self, height: int, width: int) -> Hashable:
        return ()  # each picture is computed by itself

    def predict(self, images: Sequence[Image]) -> dict[str, list[Any]]:
        return {"color_palette": [self._palettes(image) for image in images]}

    def _palettes(self, image: Image) -> dict[str, list[list[int]]]:
        rows, columns = (_even(length, self.grid) for length in image.shape[:2])
        pixels = image[rows][:, columns].reshape(-1, 3)
        colors, weights = np.unique(pixels, axis=0, return_counts=True)
        return palettes(colors.astype(np.float64), weights.astype(np.float64), self.iterations)


def _even(length: int, most: int) -> np.ndarray:
    """Indices of at most `most` evenly spread cells of an axis."""
    count = min(length, most)
    return (np.arange(count) * length + length // 2) // count


def palettes(
    colors: np.ndarray, weights: np.ndarray, iterations: int
) -> dict[str, list[list[int]]]:
    """Palettes of 1 to 7 colours: k-means in RGB, each grown from the one before.

    The colour that adds most to the error begins a new cluster (as k-means++ does on average),
    so the result is a function of the pixels alone. Where there are fewer colours than a palette
    holds, it repeats them from the most frequent on.

    Args:
        colors: Distinct colours, float64 [N, 3] in 0..255.
        weights: How often each occurs, [N].
        iterations: Most rounds of each k-means.
    """
    centres = np.average(colors, axis=0, weights=weights)[None]
    found = {}
    for number in range(1, MAX_COLORS + 1):
        if len(centres) < number:
            error = _squared(colors, centres).min(1) * weights
            if error.max() > 0:
                centres = np.concatenate([centres, colors[error.argmax()][None]])
        centres, shares = _k_means(colors, weights, centres, iterations)
        order = np.argsort(-shares, kind="stable")
        ranked = np.rint(centres[order]).astype(int).tolist()
        found[str(number)] = [ranked[i % len(ranked)] for i in range(number)]
    return found


def _squared(colors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return ((colors[:, None] - centres[None]) ** 2).sum(-1)


def _k_means(
    colors: np.ndarray, weights: np.ndarray, centres: np.ndarray, iterations: int
) -> tuple[np.ndarray, np.ndarray]:
    """Centres [k, 3] after Lloyd's rounds, and the weight of each; empty clusters stay put."""
    for _ in range(iterations):
        nearest = _squared(colors, centres).argmin(1)
        shares = np.bincount(nearest, weights, len(centres))
        sums = [np.bincount(nearest, weights * colors[:, i], len(centres)) for i in range(3)]
        moved = np.where(
            shares[:, None] > 0, np.stack(sums, 1) / np.maximum(shares, 1)[:, None], centres
        )
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres, np.bincount(_squared(colors, centres).argmin(1), weights, len(centres))
