"""What edge modalities share: strength of edges uint8 [H, W], 0 none to 255, as 8-bit PNG."""

from __future__ import annotations

import numpy as np
from PIL import Image

from models.crops import CropBox
from models.modalities.base import Modality, crop_image, open_image, png


def edges(name: str, description: str) -> Modality:
    """A modality of edge maps."""
    return Modality(
        name=name, kind="map", ext="png", encode=png, decode=_decode, crop=_crop,
        render=lambda value: np.repeat(value[..., None], 3, axis=2), description=description,
        tokenizer={"kind": "edge"},
    )  # fmt: skip


def _decode(data: bytes) -> np.ndarray:
    return np.asarray(open_image(data, ("PNG",)).convert("L"))


def _crop(value: np.ndarray, box: CropBox, size: int) -> np.ndarray:
    image = Image.fromarray(value)
    return np.asarray(crop_image(image, box, size, Image.Resampling.BILINEAR))
