"""Captions as T5 embeddings: float16 [n, C], one row for each of at most 77 tokens.

The last row is the end of the sentence, so that an empty caption has one row. A crop keeps the
words.
"""

from __future__ import annotations

import numpy as np

from models.modalities._features import decode, encode, render_rows
from models.modalities.base import Modality

MAX_TOKENS = 77


def _decode(data: bytes) -> np.ndarray:
    value = decode(data, 2)
    if len(value) > MAX_TOKENS:
        raise ValueError(f"T5 embeddings must be 1 to {MAX_TOKENS} rows [n, C], not {value.shape}")
    return value


MODALITY = Modality(
    name="t5_caption",
    kind="sequence",
    ext="npy",
    encode=encode,
    decode=_decode,
    crop=lambda value, box, size: value,
    render=render_rows,
    description="float16 [n, C], n <= 77 tokens; input only",
)
