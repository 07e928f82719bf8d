"""Captions: one string, stored as UTF-8 text."""

from __future__ import annotations

import textwrap

import numpy as np
from PIL import Image, ImageDraw

from models.crops import CropBox
from models.modalities.base import Modality
from tokenizers_vq.sequences.captions import string_to_caption
from tokenizers_vq.sequences.form import Page, TextForm

_SHOWN = 1000
"""Characters that are drawn of a caption: more than its picture holds, whatever its length."""


def _crop(value: str, box: CropBox, size: int) -> str:
    return value


def _render(value: str) -> np.ndarray:
    image = Image.new("RGB", (128, 128), "white")
    lines = textwrap.wrap(value[:_SHOWN], 21)
    ImageDraw.Draw(image).text((4, 4), "\n".join(lines), fill="black")
    return np.asarray(image)


def _write(value: str, page: Page) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is no text")
    return value


MODALITY = Modality(
    name="caption",
    kind="sequence",
    ext="txt",
    encode=lambda value: value.encode(),
    decode=lambda data: data.decode("utf-8", errors="replace"),
    crop=_crop,
    render=_render,
    description="one sentence",
    text=TextForm(
        write=_write,
        read=lambda text, page: string_to_caption(text),
        whole=True,
    ),
)
