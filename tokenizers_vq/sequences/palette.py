"""Colour palettes: v1={n}, then red, green and blue of n colours as v0={0..255} each.

With fewer than 256 bins the levels of a colour are rounded to as many steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers_vq.sequences.words import BINS, read_words, run

MAX_COLORS = 7
LEVELS = 256


def palette_to_string(colors: Sequence[Sequence[int]], *, bins: int = BINS) -> str:
    """Writes 1 to 7 colours [r, g, b] of 0..255.

    Raises:
        ValueError: if there are none, more, or one is no colour.
    """
    if not 1 <= len(colors) <= MAX_COLORS:
        raise ValueError(f"{len(colors)} colours: a palette has 1 to {MAX_COLORS}")
    for color in colors:
        if len(color) != 3 or any(not 0 <= part <= 255 for part in color):
            raise ValueError(f"{list(color)} is no colour: use three numbers of 0..255")
    top = min(LEVELS, bins) - 1
    levels = (round(int(part) * top / (LEVELS - 1)) for color in colors for part in color)
    parts = " ".join(f"v0={level}" for level in levels)
    return f"v1={len(colors)} {parts}"


def string_to_palette(text: str, *, bins: int = BINS) -> list[list[int]]:
    """Reads colours: those that are complete, at most as many as announced."""
    words = read_words(text)
    announced = MAX_COLORS
    for start, word in enumerate(words):
        if word.axis == 1:
            announced = min(word.number, MAX_COLORS)
            words = words[start + 1 :]
            break
    top = min(LEVELS, bins) - 1
    levels = [min(word.number, top) for word in run(words, 0, 3 * announced) if word.axis == 0]
    values = [round(level * (LEVELS - 1) / top) for level in levels]
    return [values[i : i + 3] for i in range(0, len(values) - 2, 3)]
