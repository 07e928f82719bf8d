"""The tasks, their metrics, and how much of the way from a constant to the teacher is gone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tasks import metrics
from tasks.evaluation.truth import Truth

Scores = dict[str, float]
Score = Callable[[Sequence[Any], Truth], Scores]
ROWS = ("constant", "teacher", "tokenizer_bound", "fourm", "fourm_10")


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """How one task is measured.

    `score` takes predictions and the truth; the entry `metric` of what it returns is the one
    that counts.
    """

    condition: str
    target: str
    metric: str
    lower_is_better: bool
    score: Score

    @property
    def name(self) -> str:
        """Such as "rgb->depth"."""
        return f"{self.condition}->{self.target}"


def depth_scores(predicted: Sequence[np.ndarray], truth: Truth) -> Scores:
    """AbsRel and delta1 over all pixels of all pictures."""
    return metrics.depth_metrics(np.stack(predicted), np.stack(truth.values["depth"]))


def normal_scores(predicted: Sequence[np.ndarray], truth: Truth) -> Scores:
    """Mean angle in degrees."""
    facts = np.stack(truth.values["normal"])
    return {"mean_angle": metrics.normal_angle(np.stack(predicted), facts)}


def semseg_scores(predicted: Sequence[np.ndarray], truth: Truth) -> Scores:
    """mIoU and the share of pixels that are right."""
    fact = np.stack(truth.values["semseg"])
    counts = metrics.confusion(np.stack(predicted), fact, truth.classes)
    right = np.diag(counts[:, : truth.classes]).sum() / max(int(counts.sum()), 1)
    return {"miou": metrics.miou(counts), "pixel_accuracy": float(right)}


def box_scores(predicted: Sequence[dict[str, Any]], truth: Truth) -> Scores:
    """AP at IoU 0.5, and F1 of the boxes as they stand."""
    facts = truth.values["det"]
    precision = metrics.detection_ap50(list(predicted), facts)
    return {"ap50": precision, "f1_50": box_f1(predicted, facts)}


def caption_scores(predicted: Sequence[str], truth: Truth) -> Scores:
    """Share of the attributes that captions get right."""
    pairs = zip(predicted, truth.values["caption"], strict=True)
    return {"attributes": float(np.mean([truth.similarity(p, t) for p, t in pairs]))}


def edge_scores(name: str) -> Score:
    """F1 of the edge pixels of a modality, to within one pixel."""
    def score(predicted: Sequence[np.ndarray], truth: Truth) -> Scores:
        return {"edge_f1": metrics.edge_f1(np.stack(predicted), np.stack(truth.values[name]))}

    return score


def feature_scores(name: str) -> Score:
    """Mean cosine with the teacher's features; of whole-image vectors also how often a predicted
    one finds its picture."""
    def score(predicted: Sequence[np.ndarray], truth: Truth) -> Scores:
        found, facts = np.stack(predicted), np.stack(truth.values[name])
        scores = {"cosine": metrics.mean_cosine(found, facts)}
        return scores if found.ndim > 2 else {**scores, **recall_scores(found, facts)}

    return score


def recall_scores(predicted: ArrayLike, gallery: ArrayLike) -> Scores:
    """Recall among all pictures of the truth, at ranks 1 and 5."""
    first, fifth = metrics.recall(predicted, gallery, (1, 5))
    return {"recall@1": first, "recall@5": fifth}


def palette_scores(predicted: Sequence[dict[str, Any]], truth: Truth) -> Scores:
    """Mean distance of the colours of palettes."""
    pairs = zip(predicted, truth.values["color_palette"], strict=True)
    return {"color_distance": float(np.mean([metrics.palette_distance(p, t) for p, t in pairs]))}


def metadata_scores(predicted: Sequence[dict[str, Any]], truth: Truth) -> Scores:
    """Share of the fields that are right."""
    pairs = zip(predicted, truth.values["metadata"], strict=True)
    return {"fields": float(np.mean([metrics.metadata_right(p, t) for p, t in pairs]))}


def pose_scores(predicted: Sequence[dict[str, Any]], truth: Truth) -> Scores:
    """F1 of keypoints, the mean over pictures."""
    pairs = zip(predicted, truth.values["human_poses"], strict=True)
    found = [metrics.keypoints_right(p["humans"], t["humans"]) for p, t in pairs]
    return {"keypoint_f1": float(np.mean(found))}


def instance_scores(predicted: Sequence[dict[str, Any]], truth: Truth) -> Scores:
    """Mean IoU of the true masks with the predicted ones that fit them best."""
    pairs = zip(predicted, truth.values["sam_instance"], strict=True)
    return {"mask_iou": float(np.mean([metrics.mask_overlap(p, t) for p, t in pairs]))}


def box_f1(predicted: Sequence[dict[str, Any]], facts: Sequence[dict[str, Any]]) -> float:
    """F1 of boxes of the right class that overlap by IoU 0.5 or more, paired greedily."""
    from models.fourm.ensemble import box_iou

    hits = total = 0
    for guess, fact in zip(predicted, facts, strict=True):
        total += len(guess["instances"]) + len(fact["instances"])
        if not guess["instances"] or not fact["instances"]:
            continue
        boxes = [np.array([i["box"] for i in v["instances"]]) for v in (guess, fact)]
        names = [np.array([*map(metrics.class_of, v["instances"])]) for v in (guess, fact)]
        overlap = box_iou(*boxes) * (names[0][:, None] == names[1][None, :])
        while overlap.max() >= 0.5:
            row, column = np.unravel_index(overlap.argmax(), overlap.shape)
            overlap[row], overlap[:, column] = 0, 0
            hits += 1
    return 2 * hits / total if total else 1.0


def class_f1(predicted: Sequence[dict[str, Any]], facts: Sequence[dict[str, Any]]) -> float:
    """F1 of the classes found, wherever they are; a class counts as often as it occurs."""
    from collections import Counter

    hits = total = 0
    for guess, fact in zip(predicted, facts, strict=True):
        counts = [Counter(map(metrics.class_of, v["instances"])) for v in (guess, fact)]
        hits += sum((counts[0] & counts[1]).values())
        total += sum(counts[0].values()) + sum(counts[1].values())
    return 2 * hits / total if total else 1.0


FROM_RGB = (
    TaskScore(condition="rgb", target="depth", metric="abs_rel", lower_is_better=True,
              score=depth_scores),
    TaskScore(condition="rgb", target="normal", metric="mean_angle", lower_is_better=True,
              score=normal_scores),
    TaskScore(condition="rgb", target="semseg", metric="miou", lower_is_better=False,
              score=semseg_scores),
    TaskScore(condition="rgb", target="det", metric="ap50", lower_is_better=False,
              score=box_scores),
    TaskScore(condition="rgb", target="caption", metric="attributes", lower_is_better=False,
              score=caption_scores),
    *(TaskScore(condition="rgb", target=name, metric="cosine", lower_is_better=False,
                score=feature_scores(name))
      for name in ("clip", "dinov2", "dinov2_global", "imagebind", "imagebind_global")),
    *(TaskScore(condition="rgb", target=name, metric="edge_f1", lower_is_better=False,
                score=edge_scores(name))
      for name in ("canny_edge", "sam_edge")),
    TaskScore(condition="rgb", target="color_palette", metric="color_distance",
              lower_is_better=True, score=palette_scores),
    TaskScore(condition="rgb", target="metadata", metric="fields", lower_is_better=False,
              score=metadata_scores),
    TaskScore(condition="rgb", target="human_poses", metric="keypoint_f1", lower_is_better=False,
              score=pose_scores),
    TaskScore(condition="rgb", target="sam_instance", metric="mask_iou", lower_is_better=False,
              score=instance_scores),
)  # fmt: skip
MEASURED = tuple(task.target for task in FROM_RGB)
"""Modalities that there is a score for."""


def entry(task: TaskScore, rows: dict[str, Scores | None]) -> dict[str, Any]:
    """The record of a task in `results.json`; None where a row does not apply."""
    result: dict[str, Any] = {"metric": task.metric, "lower_is_better": task.lower_is_better}
    for name in ROWS:
        row = rows.get(name)
        result[name] = None if row is None else round(row[task.metric], 5)
    result["gap_recovered"] = gap(result["fourm"], result["constant"], result["teacher"])
    result["gap_recovered_10"] = gap(result["fourm_10"], result["constant"], result["teacher"])
    also = {name: {k: round(v, 5) for k, v in row.items() if k != task.metric}
            for name, row in rows.items() if row is not None and len(row) > 1}  # fmt: skip
    return {**result, "also": also}


def gap(value: float | None, constant: float | None, teacher: float | None) -> float | None:
    """Where a score lies between the constant baseline (0) and the teacher (1)."""
    if value is None or constant is None or teacher is None or teacher == constant:
        return None
    return round((value - constant) / (teacher - constant), 4)
