"""Metadata of a picture: one chunk v1={type} v0={level} a field, in any order.

Counts are written as they are, sizes in steps of 32 px, qualities in 50 levels of their range.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tokenizers_vq.sequences.words import BINS, numbers, read_words

LEVELS = 50


@dataclass(frozen=True)
class Field:
    """How one number is written."""

    low: float = 0.0
    """Where its first level begins."""
    high: float = 0.0
    """Above `low`: the end of its range, 50 levels."""
    step: int = 1
    """Without a range: width of a level."""
    bounds: tuple[float, ...] = ()
    """Where its second, third, ... level begins; not empty for fields of few levels."""
    middles: tuple[float, ...] = ()
    """What is read for each of these."""

    def level(self, value: float) -> int:
        """The level of a value, rounded down and clipped to what the format holds.

        Raises:
            ValueError: if the value is no finite number.
        """
        if not math.isfinite(value):
            raise ValueError(f"{value} is no finite number")
        if self.bounds:
            return bisect_right(self.bounds, value)
        if self.high > self.low:
            share = min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)
            return int(share * (LEVELS - 1))
        return min(max(int(value // self.step), 0), BINS - 1)

    def value(self, level: int) -> float:
        """A value of that level: the middle of a range's level, else where the level begins."""
        if self.bounds:
            return self.middles[min(level, len(self.bounds))]
        if self.high > self.low:
            share = min((min(level, LEVELS - 1) + 0.5) / (LEVELS - 1), 1.0)
            return self.low + share * (self.high - self.low)
        return min(level, BINS - 1) * self.step


FIELDS: dict[str, Field] = {
    "original_width": Field(step=32),
    "original_height": Field(step=32),
    "caption_n_chars": Field(),
    "caption_n_words": Field(),
    "caption_n_sentences": Field(),
    "n_humans": Field(),
    "n_sam_instances": Field(),
    "n_coco_instances": Field(),
    "coco_instance_diversity": Field(),
    "colorfulness": Field(high=150),
    "brightness": Field(high=255),
    "contrast": Field(high=127),
    "saturation": Field(high=255),
    "entropy": Field(high=10),
    "walkability": Field(high=1),
    "objectness": Field(high=1),
    "semantic_diversity": Field(),
    "geometric_complexity": Field(high=0.75),
    "occlusion_score": Field(high=0.25),
    "watermark_score": Field(bounds=(0.5,), middles=(0.0, 1.0)),
    "aesthetic_score": Field(bounds=(4.5, 5.5), middles=(4.0, 5.0, 6.0)),
}
"""The 21 fields; their place is their type."""

_NAMES = tuple(FIELDS)


def metadata_chunks(
    metadata: Mapping[str, float], order: Iterable[str] | None = None, *, bins: int = BINS
) -> list[str]:
    """One text a field, so that masking can take or leave whole fields.

    Args:
        metadata: Field to number; fields may be missing.
        order: Names in the order of writing; by default that of `metadata`.
        bins: Levels that a word can hold; counts beyond them are clipped.

    Raises:
        ValueError: if a field is unknown or no finite number.
    """
    chunks = []
    for name in metadata if order is None else order:
        if name not in FIELDS:
            raise ValueError(f"unknown metadata field {name!r}; choose from {', '.join(_NAMES)}")
        try:
            level = FIELDS[name].level(metadata[name])
        except ValueError as error:
            raise ValueError(f"metadata field {name}: {error}") from None
        chunks.append(f"v1={_NAMES.index(name)} v0={min(level, bins - 1)}")
    return chunks


def metadata_to_string(
    metadata: Mapping[str, float], order: Iterable[str] | None = None, *, bins: int = BINS
) -> str:
    """Writes the chunks of `metadata_chunks` as one text."""
    return " ".join(metadata_chunks(metadata, order, bins=bins))


def string_to_metadata(text: str) -> dict[str, float]:
    """Reads fields; of one that occurs twice the first counts."""
    words = read_words(text)
    found: dict[str, float] = {}
    for start in range(len(words) - 1):
        pair = numbers(words, start, (1, 0))
        if pair is not None and pair[0] < len(_NAMES):
            name = _NAMES[pair[0]]
            found.setdefault(name, FIELDS[name].value(pair[1]))
    return found
