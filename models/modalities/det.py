"""Detected boxes, as the released 4M sets store them, in JSON.

``{"instances": [{"box": [xmin, ymin, xmax, ymax] in 0..1, "class_name": str, "score": float}]}``
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from models.crops import CropBox
from models.modalities.base import Modality
from models.modalities.semseg import PALETTE

MIN_VISIBLE = 0.1
"""Least share of a box's area inside the window for it to count as seen in the crop."""

Detections = dict[str, Any]


def _encode(value: Detections) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _decode(data: bytes) -> Detections:
    value = json.loads(data)
    if not isinstance(value, dict) or not isinstance(value.get("instances"), list):
        raise ValueError("a detection file must hold an object with the list 'instances'")
    return value


def _crop(value: Detections, box: CropBox, size: int) -> Detections:
    kept = []
    for instance in value["instances"]:
        x0, y0, x1, y1 = instance["box"]
        u0, u1 = (min(max((x - box.left) / box.width, 0.0), 1.0) for x in (x0, x1))
        v0, v1 = (min(max((y - box.top) / box.height, 0.0), 1.0) for y in (y0, y1))
        if box.hflip:
            u0, u1 = 1 - u1, 1 - u0
        visible = (u1 - u0) * box.width * (v1 - v0) * box.height
        if visible > MIN_VISIBLE * (x1 - x0) * (y1 - y0):
            kept.append({**instance, "box": [u0, v0, u1, v1]})
    return {**value, "instances": kept}


def draw(value: Detections, canvas: np.ndarray) -> np.ndarray:
    """Boxes and class names over a copy of a uint8 picture [H, W, 3]."""
    image = Image.fromarray(canvas)
    pen = ImageDraw.Draw(image)
    names = sorted({instance["class_name"] for instance in value["instances"]})
    for instance in value["instances"]:
        x0, y0, x1, y1 = instance["box"]
        corners = (x0 * image.width, y0 * image.height, x1 * image.width, y1 * image.height)
        colour = tuple(int(c) for c in PALETTE[names.index(instance["class_name"]) + 2])
        pen.rectangle(corners, outline=colour, width=max(1, image.width // 96))
        pen.text((corners[0] + 2, corners[1]), instance["class_name"], fill=colour)
    return np.asarray(image)


MODALITY = Modality(
    name="det",
    kind="sequence",
    ext="json",
    encode=_encode,
    decode=_decode,
    crop=_crop,
    render=lambda value: draw(value, np.full((128, 128, 3), 40, np.uint8)),
    description="boxes in 0..1 of the image with class name and score",
)
