"""Which part of a picture an edit redraws, and the rest put back as it was.

Areas are bool [H, W] over pixels or [h, w] over the cells of a token grid, True where something is
drawn anew. Boxes are those of the det modality, with corners in 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def box_area(boxes: Iterable[Sequence[float]], side: int, margin: float = 0.0) -> np.ndarray:
    """Cells bool [side, side] that boxes touch.

    Args:
        boxes: xmin, ymin, xmax, ymax in 0..1 each.
        side: Cells a side.
        margin: Width in 0..1 by which boxes are enlarged, for shadows and soft edges.

    Raises:
        ValueError: a box is turned round or beyond the picture.
    """
    area = np.zeros((side, side), bool)
    for box in boxes:
        x0, y0, x1, y1 = map(float, box)
        if not (0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1):
            raise ValueError(f"a box is xmin, ymin, xmax, ymax in 0..1, not {list(box)}")
        rows, columns = (
            slice(max(0, min(math.floor((low - margin) * side), side - 1)),
                  max(math.ceil((high + margin) * side), math.floor(low * side) + 1))
            for low, high in ((y0, y1), (x0, x1))
        )  # fmt: skip
        area[rows, columns] = True
    return area


def changed_boxes(before: dict[str, Any], after: dict[str, Any]) -> list[list[float]]:
    """Boxes that only one of two values of det holds: of what was moved, replaced or removed, and
    of what came in its place. Raises ValueError for other values."""
    pools = [_named_boxes(value) for value in (before, after)]
    left, right = pools
    for one in list(left):
        if one in right:
            left.remove(one)
            right.remove(one)
    return [list(box) for _, box in (*left, *right)]


def _named_boxes(value: dict[str, Any]) -> list[tuple[str, tuple[float, ...]]]:
    try:
        return [(one["class_name"], tuple(map(float, one["box"]))) for one in value["instances"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"boxes are a value of det, {{'instances': [{{'box', 'class_name'}}]}}, "
                         f"not {value!r:.80}") from error


def pasted(made: np.ndarray, original: np.ndarray, area: np.ndarray) -> np.ndarray:
    """`made` where `area` is True, `original` elsewhere.

    Args:
        made: [H, W] or [H, W, C].
        original: Of the same shape.
        area: bool over cells that divide the picture.

    Raises:
        ValueError: the two are not of one shape.
    """
    if made.shape != original.shape:
        raise ValueError(f"what was made is {made.shape}, the original {original.shape}")
    height, width = (n // m for n, m in zip(made.shape[:2], area.shape, strict=True))
    pixels = area.repeat(height, 0).repeat(width, 1)
    pixels = pixels.reshape(*pixels.shape, *(1,) * (made.ndim - 2))
    return np.where(pixels, made, original).astype(made.dtype)
