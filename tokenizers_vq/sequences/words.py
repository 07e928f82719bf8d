"""The words that all formats but captions are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

BINS = 1000
"""Numbers that a coordinate word can hold in the released vocabulary."""
AXES = 4
CODE_STEP = 512
"""Codes from here on are written on the second axis, less this."""

_NUMBER = re.compile(r"v([0-3])=(\d{1,6})")
_SPECIAL = re.compile(r"\[(PAD|UNK|SOS|S_\d+)\]")
_STRUCTURE = re.compile(r"\[(PAD|UNK|SOS|EOS|S_\d+)\]")
_COORDINATE = re.compile(r"(v\d)=(?=\d)", re.IGNORECASE)


class Word(NamedTuple):
    """A number on an axis, or an ordinary word (axis -1)."""

    axis: int
    number: int
    text: str


def without_special(text: str) -> str:
    """A text in which what only looks like a special token, such as a sentinel of span masking, is
    words in brackets."""
    return _STRUCTURE.sub(r"[ \1 ]", text)


def name_words(name: str) -> str:
    """A class name as words on one line, none of which passes for a special token or a number of
    a box; empty where nothing of it can be written."""
    kept = "".join(letter for letter in name if letter.isprintable() or letter.isspace())
    return _COORDINATE.sub(r"\1 = ", without_special(" ".join(kept.split())))


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


def most_codes(bins: int = BINS) -> int:
    """Codes that words can tell apart: 1024 on two axes as released, or all that four axes of
    fewer bins hold."""
    return min(2 * CODE_STEP, AXES * min(CODE_STEP, bins))


def code_word(code: int, bins: int = BINS) -> str:
    """A code below `most_codes` as a word: on the first axis those below 512 (or `bins`, where
    there are fewer), on the next axis the next ones.

    Raises:
        ValueError: if the code is outside.
    """
    if not 0 <= code < most_codes(bins):
        raise ValueError(f"code {code} must lie in 0..{most_codes(bins) - 1}")
    step = min(CODE_STEP, bins)
    return f"v{code // step}={code % step}"


def read_codes(words: Sequence[Word], count: int, bins: int = BINS) -> list[int] | None:
    """The inverse of `code_word` for exactly `count` words; None where they are no codes."""
    step = min(CODE_STEP, bins)
    if len(words) != count or any(not 0 <= word.axis * step < most_codes(bins) for word in words):
        return None
    return [word.axis * step + min(word.number, step - 1) for word in words]
