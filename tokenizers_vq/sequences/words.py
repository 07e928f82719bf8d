"""The words that all formats but captions are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

BINS = 1000
"""Numbers that a coordinate word can hold in the released vocabulary."""
CODE_STEP = 512
"""Codes from here on are written on the second axis, less this."""

_NUMBER = re.compile(r"v([0-3])=(\d{1,6})")
_SPECIAL = re.compile(r"\[(PAD|UNK|SOS|S_\d+)\]")


class Word(NamedTuple):
    """A number on an axis, or an ordinary word (axis -1)."""

    axis: int
    number: int
    text: str


def read_words(text: str) -> list[Word]:
    """Words of a text up to `[EOS]`, without special tokens."""
    words = []
    for text_of_word in text.split("[EOS]")[0].split():
        if match := _NUMBER.fullmatch(text_of_word):
            words.append(Word(int(match[1]), int(match[2]), text_of_word))
        elif not _SPECIAL.fullmatch(text_of_word):
            words.append(Word(-1, 0, text_of_word))
    return words


def numbers(words: Sequence[Word], start: int, axes: Sequence[int]) -> list[int] | None:
    """Numbers of the words from `start` on if they lie on these axes in this order, else None."""
    found = words[start : start + len(axes)]
    if [word.axis for word in found] != list(axes):
        return None
    return [word.number for word in found]


def run(words: Sequence[Word], start: int, most: int) -> list[Word]:
    """The number words from `start` on, up to `most`."""
    found: list[Word] = []
    for word in words[start : start + most]:
        if word.axis < 0:
            break
        found.append(word)
    return found


def number(axis: int, value: float, bins: int = BINS) -> str:
    """A value rounded half to even and clipped to 0..bins-1, as a word."""
    return f"v{axis}={min(max(round(value), 0), bins - 1)}"


def box_words(box: Iterable[float], bins: int = BINS) -> str:
    """A box [xmin, ymin, xmax, ymax] in 0..1 as four words."""
    return " ".join(number(axis, x * (bins - 1), bins) for axis, x in enumerate(box))


def code_word(code: int) -> str:
    """A code of 0..1023 as a word on one of two axes.

    Raises:
        ValueError: if the code is outside.
    """
    if not 0 <= code < 2 * CODE_STEP:
        raise ValueError(f"code {code} must lie in 0..{2 * CODE_STEP - 1}")
    return f"v{code // CODE_STEP}={code % CODE_STEP}"


def read_codes(words: Sequence[Word], count: int) -> list[int] | None:
    """The inverse of `code_word` for exactly `count` words; None where they are no codes."""
    if len(words) != count or any(word.axis not in (0, 1) for word in words):
        return None
    return [word.axis * CODE_STEP + min(word.number, CODE_STEP - 1) for word in words]
