"""One answer out of several samples: what a set of generations agrees on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median_low
from typing import Any

import numpy as np

from tokenizers_vq.text import folded

SAME_BOX = 0.5
"""Boxes of one class that overlap more than this (IoU) are taken for one object."""

_WORD = re.compile(r"\w+")

Similarity = Callable[[str, str], float]


def word_overlap(first: str, second: str) -> float:
    """Share of the words of two texts that they have in common, in 0..1. Tokens tell neither
    capitals and accents nor where blanks stand beside punctuation: none of these counts."""
    a, b = (set(_WORD.findall(folded(text))) for text in (first, second))
    return len(a & b) / len(a | b) if a | b else 1.0


def combine(modality: str, samples: Sequence[Any], similarity: Similarity = word_overlap) -> Any:
    """Combines samples of one modality for one input.

    Args:
        modality: Name in the catalogue; decides how.
        samples: Its values, at least one.
        similarity: Likeness of two texts, for captions.

    Returns:
        Mean of maps and vectors (normals of unit length again), most frequent class a pixel,
        boxes by vote, the palette of the most frequent length with the mean of its colours, the
        median of each metadata field, or the text that is most like all others. Of what has no
        middle (poses, instances) the first sample.
    """
    if len(samples) == 1:
        return samples[0]
    if modality == "det":
        return vote_boxes(samples)
    if modality == "caption":
        return medoid(samples, similarity)
    if modality == "color_palette":
        return mean_palette(samples)
    if modality == "metadata":
        names = dict.fromkeys(name for sample in samples for name in sample)
        return {n: median_low([s[n] for s in samples if n in s]) for n in names}
    if not isinstance(samples[0], np.ndarray):
        return samples[0]
    stacked = np.stack(samples)
    if modality == "semseg":
        return vote_classes(stacked)
    mean = stacked.astype(np.float32).mean(0)
    if modality == "normal":
        return mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-6)
    if stacked.dtype == np.uint8:
        return np.rint(mean).astype(np.uint8)
    return mean.astype(stacked.dtype)


def mean_palette(
    samples: Sequence[Mapping[str, Sequence[Sequence[int]]]],
) -> dict[str, list[list[int]]]:
    """The palette of the length that occurs most, the shortest of a draw: the mean of its first,
    second, ... colours. No palette where no sample holds one."""
    lengths = Counter(number for sample in samples for number in sample)
    if not lengths:
        return {}
    best = min(lengths, key=lambda number: (-lengths[number], int(number)))
    colors = np.mean([sample[best] for sample in samples if best in sample], axis=0)
    return {best: np.rint(colors).astype(int).tolist()}


def vote_classes(maps: np.ndarray) -> np.ndarray:
    """Most frequent class of each pixel, uint8 [K, H, W] to [H, W]; the lowest id of a draw."""
    present = np.unique(maps)
    votes = np.stack([(maps == value).sum(0) for value in present])
    return present[votes.argmax(0)].astype(maps.dtype)


def medoid(texts: Sequence[str], similarity: Similarity) -> str:
    """The text whose similarity to all texts is largest."""
    distinct = sorted(set(texts))
    counts = [texts.count(text) for text in distinct]
    support = [
        sum(n * similarity(text, other) for n, other in zip(counts, distinct, strict=True))
        for text in distinct
    ]
    return distinct[int(np.argmax(support))]


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union [n, m] of boxes [n, 4] and [m, 4] as xmin, ymin, xmax, ymax."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    areas = [np.clip(b[:, 2:] - b[:, :2], 0, None).prod(-1) for b in (first, second)]
    return shared / np.maximum(areas[0][:, None] + areas[1][None, :] - shared, 1e-9)


def vote_boxes(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Objects that samples of one image agree on.

    Boxes of one class that overlap are gathered, the best supported first and at most one from
    each sample; an object is the mean of its boxes, its score the share of samples that see it.
    """
    found = [
        (instance["class_name"], instance["box"], instance.get("score", 1.0), number)
        for number, sample in enumerate(samples)
        for instance in sample["instances"]
    ]
    instances = []
    for name in sorted({entry[0] for entry in found}):
        entries = [entry for entry in found if entry[0] == name]
        boxes = np.array([entry[1] for entry in entries], np.float64)
        weights = np.array([entry[2] for entry in entries], np.float64)
        owners = np.array([entry[3] for entry in entries])
        instances += _clusters(name, boxes, weights, owners, len(samples))
    return {"instances": sorted(instances, key=lambda found: -found["score"])}


def _clusters(
    name: str, boxes: np.ndarray, weights: np.ndarray, owners: np.ndarray, samples: int
) -> list[dict[str, Any]]:
    overlap, free, instances = box_iou(boxes, boxes), np.ones(len(boxes), bool), []
    while free.any():
        support = ((overlap > SAME_BOX) & free) @ weights
        centre = int(np.where(free, support, -1.0).argmax())
        members: dict[int, int] = {}
        for index in np.argsort(-overlap[centre], kind="stable"):
            if free[index] and overlap[centre, index] > SAME_BOX:
                members.setdefault(int(owners[index]), int(index))
        chosen = sorted({*members.values(), centre})
        free[chosen] = False
        box = np.average(boxes[chosen], axis=0, weights=np.maximum(weights[chosen], 1e-6))
        votes = len(set(owners[chosen].tolist()))
        # Between objects with equal votes, the more confident boxes rank first.
        score = (votes + 0.5 * float(weights[chosen].mean()) - 0.5) / samples
        instances.append({"box": box.tolist(), "class_name": name, "score": max(score, 1e-6)})
    return instances
