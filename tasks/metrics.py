"""Task metrics of labels and generations against the truth, as pure functions of arrays."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenizers_vq.sequences.metadata import FIELDS
from tokenizers_vq.text import folded

if TYPE_CHECKING:
    import torch

EDGE = 64
"""Strength from which a pixel of an edge map counts as an edge; codes blur thin lines."""

NEAREST = 0.01
"""Depth that nearer ones count as, in their own unit, where what depth codes tell apart begins.
Depth without a scale is 0 at a picture's nearest pixel: relative errors beside it have no bound.
"""

_EQUAL = 1e-12  # cosines that part by less are equal

Detections = dict[str, Any]
"""A "det" value: {"instances": [{"box", "class_name", "score"}]}."""


def depth_metrics(predicted: ArrayLike, truth: ArrayLike) -> dict[str, float]:
    """Compare depths in the same unit; pixels whose truth is not positive do not count, and those
    nearer than `NEAREST` count as that near.

    Args:
        predicted: Any shape.
        truth: The same shape.

    Returns:
        "abs_rel", the mean of |predicted - truth| / truth, and "delta1", the share of pixels
        within a factor of 1.25.
    """
    guess, fact = np.asarray(predicted, np.float64).ravel(), np.asarray(truth, np.float64).ravel()
    valid = fact > 0
    guess, fact = np.maximum(guess[valid], NEAREST), np.maximum(fact[valid], NEAREST)
    ratio = np.maximum(guess / fact, fact / guess)
    return {
        "abs_rel": float(np.mean(np.abs(guess - fact) / fact)),
        "delta1": float(np.mean(ratio < 1.25)),
    }


def normal_angle(predicted: ArrayLike, truth: ArrayLike) -> float:
    """Return the mean angle in degrees between vectors [..., 3] of any length."""
    guess, fact = np.asarray(predicted, np.float64), np.asarray(truth, np.float64)
    lengths = np.linalg.norm(guess, axis=-1) * np.linalg.norm(fact, axis=-1)
    cosine = (guess * fact).sum(-1) / np.maximum(lengths, 1e-9)
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean())


def confusion(predicted: ArrayLike, truth: ArrayLike, classes: int) -> NDArray[np.int64]:
    """Count pixels by class: int64 [classes, classes + 1], truth by prediction.

    Pixels whose truth is no class (255, "unlabelled") do not count. Predictions outside of the
    classes fall into the last column, so that they count as wrong.
    """
    fact = np.asarray(truth).ravel().astype(np.int64)
    guess = np.asarray(predicted).ravel().astype(np.int64)
    guess = np.where((guess >= 0) & (guess < classes), guess, classes)
    valid = (fact >= 0) & (fact < classes)
    width = classes + 1
    counts = np.bincount(fact[valid] * width + guess[valid], minlength=classes * width)
    return counts.reshape(classes, width)


def miou(counts: NDArray[np.int64]) -> float:
    """Return the mean over the classes of intersection over union.

    Args:
        counts: Of `confusion`, summed over pictures. Classes that occur neither in the truth nor
            in the predictions do not count.
    """
    classes = counts.shape[0]
    hit = np.diag(counts[:, :classes])
    union = counts.sum(1) + counts[:, :classes].sum(0) - hit
    return float((hit[union > 0] / union[union > 0]).mean()) if (union > 0).any() else 0.0


def edge_f1(predicted: ArrayLike, truth: ArrayLike, *, reach: int = 1) -> float:
    """Return the F1 of edge pixels; one counts as right within `reach` pixels of one of the other.

    Args:
        predicted: Strength of edges [N, H, W] in 0..255; those from `EDGE` on are edges.
        truth: The same.
        reach: Pixels, also diagonally.

    Returns:
        In 0..1; 1 where there is no edge and none is predicted.
    """
    from scipy.ndimage import maximum_filter

    guess, fact = np.asarray(predicted) >= EDGE, np.asarray(truth) >= EDGE
    if not (guess.any() or fact.any()):
        return 1.0
    window = (1, 2 * reach + 1, 2 * reach + 1)
    right = int((guess & maximum_filter(fact, window)).sum())
    found = int((fact & maximum_filter(guess, window)).sum())
    precision, recall = right / max(int(guess.sum()), 1), found / max(int(fact.sum()), 1)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def mean_cosine(predicted: ArrayLike, truth: ArrayLike) -> float:
    """Return the mean cosine of vectors [..., C]."""
    guess, fact = np.asarray(predicted, np.float64), np.asarray(truth, np.float64)
    lengths = np.linalg.norm(guess, axis=-1) * np.linalg.norm(fact, axis=-1)
    return float(((guess * fact).sum(-1) / np.maximum(lengths, 1e-9)).mean())


def recall(predicted: ArrayLike, gallery: ArrayLike, at: Sequence[int] = (1, 5)) -> list[float]:
    """Return how often a vector finds its own among all others by the cosine.

    Args:
        predicted: Queries [N, C]; row i looks for row i of the gallery.
        gallery: [N, C].
        at: Ranks up to which it has to be; of equal cosines the worst case counts.
    """
    sides = [np.asarray(side, np.float64) for side in (predicted, gallery)]
    guess, fact = (s / np.maximum(np.linalg.norm(s, axis=1, keepdims=True), 1e-9) for s in sides)
    likeness = guess @ fact.T
    # What is no number finds nothing; sums of equal numbers differ in their last bits.
    rank = (~(likeness < np.diag(likeness)[:, None] - _EQUAL)).sum(1)
    return [float((rank <= place).mean()) for place in at]


def palette_distance(
    predicted: dict[str, list[list[int]]], truth: dict[str, list[list[int]]]
) -> float:
    """Return how far colours of two palettes lie apart, in 0..255 a channel (Euclidean).

    Each predicted palette is held against the true one of as many colours, or of the nearest number
    that there is: the mean distance of a colour to the nearest one of the other, both ways. No
    palette at all counts as black.
    """
    black = {"1": [[0, 0, 0]]}
    apart, facts = [], truth or black
    for number, colors in (predicted or black).items():
        near = min(facts, key=lambda known: abs(int(known) - int(number)))
        guess, fact = np.array(colors, np.float64), np.array(facts[near], np.float64)
        distance = np.linalg.norm(guess[:, None] - fact[None], axis=-1)
        apart.append((distance.min(0).mean() + distance.min(1).mean()) / 2)
    return float(np.mean(apart))


def metadata_right(predicted: dict[str, float], truth: dict[str, float]) -> float:
    """Return the share of the true fields that are right: counts as they are written, qualities
    in 50 levels to within one level."""
    right = 0
    for name, value in truth.items():
        if name in predicted:
            form = FIELDS[name]
            slack = 1 if form.high > form.low else 0
            right += abs(form.level(predicted[name]) - form.level(value)) <= slack
    return right / len(truth) if truth else 1.0


def keypoints_right(
    predicted: Sequence[dict[str, Any]], truth: Sequence[dict[str, Any]], *, reach: float = 0.1
) -> float:
    """F1 of the keypoints of one picture, of those that were seen: one is right within `reach` of
    the diagonal of the person's box. People are paired by the overlap of their boxes.

    Args:
        predicted: `{"box": [xmin, ymin, xmax, ymax], "keypoints": 17 x [x, y, score]}` each.
        truth: The same; keypoints of a score below 0.3 do not count.
        reach: Greatest distance, a share of the diagonal.
    """
    from models.fourm.ensemble import box_iou

    seen = [[np.array(each["keypoints"])[:, 2] >= 0.3 for each in people]
            for people in (predicted, truth)]  # fmt: skip
    total = sum(int(mask.sum()) for masks in seen for mask in masks)
    if not total:
        return 1.0
    hits = 0
    if predicted and truth:
        overlap = box_iou(*(np.array([p["box"] for p in people]) for people in (predicted, truth)))
        while overlap.max() > 0:
            guess, fact = (int(i) for i in np.unravel_index(overlap.argmax(), overlap.shape))
            overlap[guess], overlap[:, fact] = 0, 0
            places = [np.array(people[i]["keypoints"])[:, :2]
                      for people, i in ((predicted, guess), (truth, fact))]  # fmt: skip
            x0, y0, x1, y1 = truth[fact]["box"]
            near = np.hypot(*(places[0] - places[1]).T) <= reach * np.hypot(x1 - x0, y1 - y0)
            hits += int((near & seen[0][guess] & seen[1][fact]).sum())
    return 2 * hits / total


def mask_overlap(predicted: dict[str, Any], truth: dict[str, Any]) -> float:
    """Mean over the true instances of a picture of the best IoU that any predicted mask has with
    it; 1 where there is none and none is predicted. Both values are of one size in pixels."""
    if not truth["instances"]:
        return float(not predicted["instances"])
    guesses, facts = (_whole_masks(value) for value in (predicted, truth))
    if not len(guesses):
        return 0.0
    shared = facts @ guesses.T
    union = facts.sum(1)[:, None] + guesses.sum(1)[None] - shared
    return float((shared / np.maximum(union, 1)).max(1).mean())


def _whole_masks(value: dict[str, Any]) -> NDArray[np.float32]:
    """Masks [N, H * W] of all instances at the size of the picture."""
    height, width = value["size"]
    masks = np.zeros((len(value["instances"]), height, width), np.float32)
    for mask, each in zip(masks, value["instances"], strict=True):
        left, top, right, bottom = each["box"]
        mask[top:bottom, left:right] = each["mask"]
    return masks.reshape(len(masks), height * width)


def class_of(instance: dict[str, Any]) -> str:
    """The class of a box as all compare it: without what tokens do not tell, capitals, accents and
    blanks among them."""
    return "".join(folded(instance["class_name"]).split())


def detection_ap50(predicted: Sequence[Detections], truth: Sequence[Detections]) -> float:
    """Return the mean over classes of average precision at IoU 0.5, by COCO's rules.

    Args:
        predicted: One "det" value an image, ranked by their scores.
        truth: One "det" value an image.

    Returns:
        In 0..1; classes without a true box do not count.
    """
    from torchmetrics.detection import MeanAveragePrecision

    # The backend reports every evaluation in twelve lines.
    logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)
    values = [*predicted, *truth]
    names = sorted({class_of(each) for value in values for each in value["instances"]})
    metric = MeanAveragePrecision(
        iou_type="bbox", iou_thresholds=[0.5], backend="faster_coco_eval"
    )
    metric.warn_on_many_detections = False
    metric.update(
        [_as_tensors(value, names) for value in predicted],
        [_as_tensors(value, names) for value in truth],
    )
    return max(float(metric.compute()["map_50"]), 0.0)


def _as_tensors(value: Detections, names: list[str]) -> dict[str, torch.Tensor]:
    import torch

    found = value["instances"]
    # COCO's areas are whole pixels: boxes in 0..1 are scaled up, which changes no overlap.
    boxes = torch.tensor([each["box"] for each in found], dtype=torch.float32).reshape(-1, 4)
    return {
        "boxes": boxes * 1000,
        "scores": torch.tensor([float(each.get("score", 1.0)) for each in found]),
        "labels": torch.tensor([names.index(class_of(each)) for each in found]),
    }
