"""Captions: one string, stored as UTF-8 text."""

from __future__ import annotations

import textwrap

import numpy as np
from PIL import Image, ImageDraw

from models.crops import CropBox
from models.modalities.base import Modality
from tokenizers_vq.sequences.captions import caption_to_text, string_to_caption
from tokenizers_vq.sequences.form import TextForm


def _crop(value: str, box: CropBox, size: int) -> str:
    return value


def _render(value: str) -> np.ndarray:
    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).text((4, 4), "\n".join(textwrap.wrap(value, 21)), fill="black")
    return np.asarray(image)


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
        write=lambda value, page: caption_to_text(value),
        read=lambda text, page: string_to_caption(text),
        whole=True,
    ),
)
