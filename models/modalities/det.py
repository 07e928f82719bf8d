"""Detected boxes, as the released 4M sets store them, in JSON.

``{"instances": [{"box": [xmin, ymin, xmax, ymax] in 0..1, "class_name": str, "score": float}]}``
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from infra.strict import read_json
from models.crops import CropBox
from models.modalities._boxes import drawable, is_box, is_number, window
from models.modalities.base import Modality, to_json
from models.modalities.semseg import PALETTE
from tokenizers_vq.sequences.boxes import MIN_SCORE, det_to_string, read_boxes, string_to_det
from tokenizers_vq.sequences.form import Page, TextForm

Detections = dict[str, Any]


def _decode(data: bytes) -> Detections:
    value = read_json(data)
    if not isinstance(value, dict) or not isinstance(value.get("instances"), list):
        raise ValueError("a detection file must hold an object with the list 'instances'")
    if not all(map(_is_instance, value["instances"])):
        raise ValueError("an instance must have a box of four numbers, a class_name and, if "
                         "any, a score that is a number")  # fmt: skip
    return value


def _is_instance(each: object) -> bool:
    return (
        isinstance(each, dict) and is_box(each.get("box"))
        and isinstance(each.get("class_name"), str) and is_number(each.get("score", 1.0))
    )  # fmt: skip


def _crop(value: Detections, box: CropBox, size: int) -> Detections:
    kept = []
    for instance in value["instances"]:
        seen = window(instance["box"], box)
        if seen is not None:
            kept.append({**instance, "box": seen})
    return {**value, "instances": kept}


def draw(value: Detections, canvas: np.ndarray) -> np.ndarray:
    """Boxes and class names over a copy of a uint8 picture [H, W, 3]."""
    image = Image.fromarray(canvas)
    pen = ImageDraw.Draw(image)
    names = sorted({instance["class_name"] for instance in value["instances"]})
    for instance in value["instances"]:
        x0, y0, x1, y1 = map(drawable, instance["box"])
        left, right = sorted((x0 * image.width, x1 * image.width))
        top, bottom = sorted((y0 * image.height, y1 * image.height))
        colour = tuple(int(c) for c in PALETTE[(names.index(instance["class_name"]) + 2) % 255])
        pen.rectangle((left, top, right, bottom), outline=colour, width=max(1, image.width // 96))
        pen.text((left + 2, top), instance["class_name"][: image.width], fill=colour)
    return np.asarray(image)


def _write(value: Detections, page: Page) -> str:
    least = MIN_SCORE if page.min_score is None else page.min_score
    return det_to_string(value["instances"], bins=page.bins, min_score=least)


MODALITY = Modality(
    name="det",
    kind="sequence",
    ext="json",
    encode=to_json,
    decode=_decode,
    crop=_crop,
    render=lambda value: draw(value, np.full((128, 128, 3), 40, np.uint8)),
    description="boxes in 0..1 of the image with class name and score",
    text=TextForm(
        write=_write,
        read=lambda text, page: string_to_det(text, bins=page.bins),
        min_score=MIN_SCORE,
        read_scored=lambda ids, confidence, text: {"instances": read_boxes(ids, confidence, text)},
    ),
)
