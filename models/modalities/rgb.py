"""RGB pictures: uint8 [H, W, 3], stored as JPEG (quality 95, no chroma subsampling)."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from models.crops import CropBox
from models.modalities.base import Modality, crop_image, open_image


def _encode(value: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(value).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _decode(data: bytes) -> np.ndarray:
    image = open_image(data, ("JPEG", "PNG", "WEBP"))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _crop(value: np.ndarray, box: CropBox, size: int) -> np.ndarray:
    image = Image.fromarray(value)
    return np.asarray(crop_image(image, box, size, Image.Resampling.BICUBIC))


MODALITY = Modality(
    name="rgb",
    kind="image",
    ext="jpg",
    encode=_encode,
    decode=_decode,
    crop=_crop,
    render=lambda value: value,
    description="uint8 [H, W, 3], sRGB",
)
