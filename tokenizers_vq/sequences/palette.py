"""Colour palettes: v1={n}, then red, green and blue of n colours as v0={0..255} each."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers_vq.sequences.words import read_words, run

MAX_COLORS = 7


def palette_to_string(colors: Sequence[Sequence[int]]) -> str:
    """Writes 1 to 7 colours [r, g, b] of 0..255.

    Raises:
        ValueError: if there are none, more, or one is no colour.
    """
    if not 1 <= len(colors) <= MAX_COLORS:
        raise ValueError(f"{len(colors)} colours: a palette has 1 to {MAX_COLORS}")
    for color in colors:
        if len(color) != 3 or any(not 0 <= part <= 255 for part in color):
            raise ValueError(f"{list(color)} is no colour: use three numbers of 0..255")
    parts = " ".join(f"v0={int(part)}" for color in colors for part in color)
    return f"v1={len(colors)} {parts}"


def string_to_palette(text: str) -> list[list[int]]:
    """Reads colours: those that are complete, at most as many as announced."""
    words = read_words(text)
    announced = MAX_COLORS
    for start, word in enumerate(words):
        if word.axis == 1:
            announced = min(word.number, MAX_COLORS)
            words = words[start + 1 :]
            break
    values = [min(word.number, 255) for word in run(words, 0, 3 * announced) if word.axis == 0]
    return [values[i : i + 3] for i in range(0, len(values) - 2, 3)]
