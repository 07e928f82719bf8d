"""SAM instances: query points, and for each the masks that contain it.

    point v0={y} v1={x} none
    point v0={y} v1={x} polygon v0={xmin} v1={ymin} v2={xmax} v3={ymax} + 16 codes ...

Coordinates are whole pixels of the crop, scaled where there are fewer bins than pixels; codes are
those of the mask tokenizer, 0..1023 (fewer with few bins).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers_vq.sequences.words import (
    BINS,
    Word,
    code_word,
    number,
    numbers,
    read_codes,
    read_words,
    run,
)

CODES = 16
Point = Sequence[float]


def sam_to_string(
    instances: Sequence[Mapping[str, Any]],
    points: Sequence[Point],
    *,
    bins: int = BINS,
    scale: tuple[float, float] = (1.0, 1.0),
) -> str:
    """Writes what lies at some points, in the order given.

    Args:
        instances: `{"box": [xmin, ymin, xmax, ymax] in px, "codes": 16 codes}` each, with its
            outline `"polygon": [[x, y], ...]`, whose border counts as inside, or its `"mask"`
            [h, w], which covers the box. One that several points hit is written several times.
        points: (x, y) in px.
        bins: Numbers that a coordinate word can hold.
        scale: What x and y are multiplied with to become such numbers.

    Raises:
        ValueError: if an instance has another number of codes, or one out of range.
    """
    parts = []
    for x, y in points:
        place = number(0, y * scale[1], bins), number(1, x * scale[0], bins)
        parts.append(" ".join(["point", *place]))
        hit = [_polygon(each, bins, scale) for each in instances if inside(each, x, y)]
        parts += hit or ["none"]
    return " ".join(parts)


def _polygon(instance: Mapping[str, Any], bins: int, scale: tuple[float, float]) -> str:
    codes = instance["codes"]
    if len(codes) != CODES:
        raise ValueError(f"{len(codes)} codes: an instance has {CODES}")
    box = (number(axis, x * scale[axis % 2], bins) for axis, x in enumerate(instance["box"]))
    return " ".join(["polygon", *box, *(code_word(int(code), bins) for code in codes)])


def inside(instance: Mapping[str, Any], x: float, y: float) -> bool:
    """Whether a point in px lies in the outline or the mask of an instance."""
    if "polygon" in instance:
        return contains(instance["polygon"], x, y)
    column, row = int(x - instance["box"][0]), int(y - instance["box"][1])
    height, width = instance["mask"].shape
    return 0 <= row < height and 0 <= column < width and bool(instance["mask"][row, column])


def contains(polygon: Sequence[Point], x: float, y: float) -> bool:
    """Whether a point lies in a polygon or on its border (even-odd rule)."""
    inside = False
    for (x0, y0), (x1, y1) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        cross = (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0)
        if cross == 0 and min(x0, x1) <= x <= max(x0, x1) and min(y0, y1) <= y <= max(y0, y1):
            return True
        if (y0 > y) != (y1 > y) and x < x0 + (x1 - x0) * (y - y0) / (y1 - y0):
            inside = not inside
    return inside


def string_to_sam(text: str, *, bins: int = BINS) -> list[dict[str, Any]]:
    """Reads query points with their instances.

    Returns:
        `{"point": [x, y], "instances": [{"box", "codes"}, ...]}` each. A point without both
        numbers is left out with what follows it; so is an instance that is incomplete or whose
        box is not upright.
    """
    words = read_words(text)
    found: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    for i, word in enumerate(words):
        if word.text == "point":
            instances = []
            place = numbers(words, i + 1, (0, 1))
            if place is not None:
                found.append({"point": [place[1], place[0]], "instances": instances})
        elif word.text == "polygon":
            instance = _read_instance(words, i + 1, bins)
            if instance is not None:
                instances.append(instance)
    return found


def _read_instance(words: Sequence[Word], start: int, bins: int) -> dict[str, Any] | None:
    box = numbers(words, start, (0, 1, 2, 3))
    codes = read_codes(run(words, start + 4, CODES), CODES, bins)
    if box is None or codes is None or box[2] < box[0] or box[3] < box[1]:
        return None
    return {"box": box, "codes": codes}
