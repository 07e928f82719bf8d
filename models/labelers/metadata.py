"""Metadata of a sample, computed from its picture and from whatever labels it has.

4M-21 names 21 fields and says in words what they measure, so each formula is written here. Two of
them, watermark_score and aesthetic_score, come with web lists (LAION, COYO) or from a network of
their own and are never computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from models.labelers.base import ORIGINAL_SIZE, Image, Labeler, LabelerSpec, options_of
from models.labelers.canny import grey
from models.modalities.metadata import Metadata

COCO_THINGS = tuple(range(80))
"""Countable classes of COCO panoptic in the order of its segmenters."""
COCO_WALKABLE = (87, 90, 96, 97, 100, 102, 105, 106, 122, 123, 125, 126, 132)
"""Its floors, gravel, platform, playing field, road, sand, snow, stairs, pavement, grass, dirt and
rug."""

UNLABELLED = 255
_SENTENCE = re.compile(r"[^.!?]*\w[^.!?]*(?:[.!?]+|$)")
_MOST_PIXELS = 1_000_000  # of an image that is looked at; larger ones are thinned evenly


class MetadataLabeler(Labeler):
    """Writes "metadata": the fields that can be computed from what the sample has.

    Options:
        person: Class name that counts as a human among boxes, where there are no poses ("person").
        min_score: Least score of a box that counts (0.6).
        walkable: Class ids of semseg on which one can walk (those of COCO panoptic).
        things: Class ids of semseg that are countable objects (those of COCO panoptic).
    """

    also_reads: ClassVar[tuple[str, ...]] = (
        "caption", "det", "human_poses", "sam_instance", "semseg", "normal", "depth",
    )  # fmt: skip

    asks_size: ClassVar[bool] = True
    version: ClassVar[int] = 2  # 1 took the stored size for the original one

    def __init__(self, spec: LabelerSpec) -> None:
        super().__init__(spec)
        self.options = options_of(
            spec, person="person", min_score=0.6, walkable=COCO_WALKABLE, things=COCO_THINGS
        )

    def seen(self, height: int, width: int) -> Hashable:
        return ()  # each sample is computed by itself

    def predict(self, images: Sequence[Any]) -> dict[str, list[Any]]:
        return {"metadata": [self._fields(sample) for sample in images]}

    def label_samples(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        return self.in_batches(samples)

    def _fields(self, sample: Mapping[str, Any]) -> Metadata:
        fields: Metadata = {}
        for name, compute in _COMPUTE.items():
            if sample.get(name) is not None:
                fields |= compute(sample[name], self.options)
        return fields | _came_as(sample)


def _came_as(sample: Mapping[str, Any]) -> Metadata:
    """The size in which the picture came, where it is known; on its side if it was turned."""
    if sample.get(ORIGINAL_SIZE) is None:
        return {}
    (width, height), stored = sample[ORIGINAL_SIZE], sample["rgb"].shape
    if (width - height) * (stored[1] - stored[0]) < 0:
        width, height = height, width
    return {"original_width": width, "original_height": height}


def _of_picture(image: Image, options: dict[str, Any]) -> Metadata:
    """Size, colourfulness (Hasler and Suesstrunk 2003), mean and deviation of grey, mean
    saturation of HSV in 0..255, entropy of the grey histogram in bits."""
    height, width = image.shape[:2]
    step = int(np.ceil(np.sqrt(height * width / _MOST_PIXELS)))
    seen = image[::step, ::step]
    luma = grey(seen)
    pixels = seen.reshape(-1, 3).astype(np.float32)
    red_green = pixels[:, 0] - pixels[:, 1]
    yellow_blue = (pixels[:, 0] + pixels[:, 1]) / 2 - pixels[:, 2]
    spread = np.hypot(red_green.std(), yellow_blue.std())
    offset = np.hypot(red_green.mean(), yellow_blue.mean())
    top, bottom = pixels.max(1), pixels.min(1)
    saturation = (top - bottom) / np.maximum(top, 1) * 255
    shares = np.bincount(luma.astype(np.uint8).ravel(), minlength=256) / luma.size
    shares = shares[shares > 0]
    return {
        "original_width": width,
        "original_height": height,
        "colorfulness": float(spread + 0.3 * offset),
        "brightness": float(luma.mean()),
        "contrast": float(luma.std()),
        "saturation": float(saturation.mean()),
        "entropy": float(-(shares * np.log2(shares)).sum()) + 0.0,
    }


def _of_caption(text: str, options: dict[str, Any]) -> Metadata:
    return {
        "caption_n_chars": len(text),
        "caption_n_words": len(text.split()),
        "caption_n_sentences": len(_SENTENCE.findall(text)),
    }


def _of_boxes(value: dict[str, Any], options: dict[str, Any]) -> Metadata:
    names = [
        each["class_name"]
        for each in value["instances"]
        if each.get("score", 1.0) >= options["min_score"]
    ]
    return {
        "n_humans": names.count(options["person"]),
        "n_coco_instances": len(names),
        "coco_instance_diversity": len(set(names)),
    }


def _of_classes(value: np.ndarray, options: dict[str, Any]) -> Metadata:
    """Shares of the labelled pixels, and the number of classes that occur."""
    counts = np.bincount(value.ravel(), minlength=UNLABELLED + 1)[:UNLABELLED]
    known = max(1, int(counts.sum()))
    return {
        "walkability": float(counts[list(options["walkable"])].sum() / known),
        "objectness": float(counts[list(options["things"])].sum() / known),
        "semantic_diversity": int((counts > 0).sum()),
    }


def _of_normals(value: np.ndarray, options: dict[str, Any]) -> Metadata:
    """Circular variance of the normals: 0 for one plane, 1 where they point everywhere."""
    mean = value.reshape(-1, 3).astype(np.float64).mean(0)
    return {"geometric_complexity": float(np.clip(1 - np.linalg.norm(mean), 0, 1))}


def _of_depth(value: np.ndarray, options: dict[str, Any]) -> Metadata:
    """Share of pixels from which depth jumps by more than a tenth to the right or downwards."""
    far = np.maximum(value.astype(np.float32), 1e-3)
    jump = np.zeros(far.shape, bool)
    jump[:, :-1] |= np.abs(np.diff(np.log(far), axis=1)) > np.log(1.1)
    jump[:-1] |= np.abs(np.diff(np.log(far), axis=0)) > np.log(1.1)
    return {"occlusion_score": float(jump.mean())}


_COMPUTE: dict[str, Callable[[Any, dict[str, Any]], Metadata]] = {
    "rgb": _of_picture,
    "caption": _of_caption,
    "det": _of_boxes,
    # After boxes: who has a pose is a human, whatever the boxes say.
    "human_poses": lambda value, options: {"n_humans": len(value["humans"])},
    "sam_instance": lambda value, options: {"n_sam_instances": len(value["instances"])},
    "semseg": _of_classes,
    "normal": _of_normals,
    "depth": _of_depth,
}
