"""Boxes [xmin, ymin, xmax, ymax] in 0..1 of an image, seen through the window of a crop."""

from __future__ import annotations

from collections.abc import Sequence

from models.crops import CropBox

MIN_VISIBLE = 0.1
"""Least share of a box's area inside the window for it to count as seen in the crop."""
_MOST = 1e12


def is_number(value: object) -> bool:
    """Whether a value that was read from a file is a number that can be reckoned with."""
    return isinstance(value, int | float) and type(value) is not bool and -_MOST <= value <= _MOST


def is_box(value: object) -> bool:
    """Whether a value that was read from a file is a box: a list of four numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def window(corners: Sequence[float], box: CropBox) -> list[float] | None:
    """The visible part of a box in 0..1 of the window, None where too little of it is visible."""
    x0, y0, x1, y1 = corners
    u0, u1 = (min(max((x - box.left) / box.width, 0.0), 1.0) for x in (x0, x1))
    v0, v1 = (min(max((y - box.top) / box.height, 0.0), 1.0) for y in (y0, y1))
    if box.hflip:
        u0, u1 = 1 - u1, 1 - u0
    visible = (u1 - u0) * box.width * (v1 - v0) * box.height
    return [u0, v0, u1, v1] if visible > MIN_VISIBLE * (x1 - x0) * (y1 - y0) else None


def point(x: float, y: float, box: CropBox) -> tuple[float, float]:
    """A point in the coordinates of the window; beyond 0..1 where it lies outside."""
    u, v = (x - box.left) / box.width, (y - box.top) / box.height
    return (1 - u if box.hflip else u), v
