"""Captions: the text itself, whatever form a file gives it in."""

from __future__ import annotations

import re
from typing import Any

_SPECIAL = re.compile(r"\[(?:PAD|UNK|SOS|S_\d+)\]")


def caption_to_string(value: Any, index: int = 0) -> str:
    """The caption of a value as released files hold them.

    Args:
        value: A string, `{"caption": string}`, or a list of either.
        index: Which of a list, modulo its length.

    Raises:
        ValueError: if the value is nothing of this.
    """
    if isinstance(value, list):
        if not value:
            raise ValueError("a list of captions must not be empty")
        value = value[index % len(value)]
    if isinstance(value, dict):
        value = value.get("caption")
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no caption: use a string, {{'caption': str}} or a list")
    return value


def string_to_caption(text: str) -> str:
    """The caption in decoded ids: up to `[EOS]`, special tokens left out, single blanks."""
    return " ".join(_SPECIAL.sub(" ", text.split("[EOS]")[0]).split())
