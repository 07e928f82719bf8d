"""Colour palettes of one to seven colours: `{"1": [[r, g, b]], ..., "7": [[r, g, b], ...]}`.

Colours are integers in 0..255, the most frequent first. The file is JSON as in the released sets,
a list that holds one such object.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from infra.strict import read_json
from models.modalities.base import Modality, to_json
from tokenizers_vq.sequences.form import Page, TextForm
from tokenizers_vq.sequences.palette import palette_to_string, string_to_palette

MAX_COLORS = 7

Palettes = dict[str, list[list[int]]]


def _decode(data: bytes) -> Palettes:
    value = read_json(data)
    if not isinstance(value, list) or len(value) != 1 or not _is_palettes(value[0]):
        raise ValueError("a palette file must hold a list of one object with n colours under 'n'")
    return value[0]


def _is_palettes(value: Any) -> bool:
    return isinstance(value, dict) and all(
        number in map(str, range(1, MAX_COLORS + 1))
        and isinstance(colors, list)
        and len(colors) == int(number)
        and all(_is_color(color) for color in colors)
        for number, colors in value.items()
    )


def _is_color(color: Any) -> bool:
    return (
        isinstance(color, list)
        and len(color) == 3
        and all(type(part) is int and 0 <= part <= 255 for part in color)
    )


def _render(value: Palettes) -> np.ndarray:
    """A row for each palette."""
    picture = np.full((MAX_COLORS * 18, 126, 3), 255, np.uint8)
    for number, colors in value.items():
        top = (int(number) - 1) * 18
        stripes = np.array(colors, np.uint8)[np.arange(126) * len(colors) // 126]
        picture[top : top + 16] = stripes
    return picture


def _write(value: Palettes, page: Page) -> str:
    """One of the palettes, each as likely as the others; nothing where there is none."""
    if not value:
        return ""
    number = sorted(value)[int(page.rng.integers(len(value)))]
    return palette_to_string(value[number], bins=page.bins)


def _read(text: str, page: Page) -> Palettes:
    colors = string_to_palette(text, bins=page.bins)
    return {str(len(colors)): colors} if colors else {}


MODALITY = Modality(
    name="color_palette",
    kind="sequence",
    ext="json",
    encode=lambda value: to_json([value]),
    decode=_decode,
    crop=lambda value, box, size: value,
    render=_render,
    description="palettes of 1 to 7 colours, integers 0..255, the most frequent first",
    text=TextForm(write=_write, read=_read, min_bins=MAX_COLORS + 1),
)
