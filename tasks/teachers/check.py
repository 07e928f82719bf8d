"""What the shipped teachers reach: labels of held-out scenes, made as the pipeline makes them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from infra.scenes import CLASSES, MAX_DEPTH, SHAPES
from models.labelers import LabelerSpec, load_labeler
from tasks.metrics import confusion, depth_metrics, miou, normal_angle
from tasks.teachers.data import HELD_OUT, TeacherScenes


def _depth(values: list[Any], scenes: TeacherScenes, numbers: range) -> dict[str, float]:
    truth = np.stack([scenes.depth[number] for number in numbers])
    return depth_metrics(np.stack(values) * MAX_DEPTH, truth)


def _normal(values: list[Any], scenes: TeacherScenes, numbers: range) -> dict[str, float]:
    truth = np.stack([scenes.normal[number] for number in numbers])
    return {"angle": normal_angle(np.stack(values), truth)}


def _semseg(values: list[Any], scenes: TeacherScenes, numbers: range) -> dict[str, float]:
    truth = np.stack([scenes.classes[number] for number in numbers])
    return {"miou": miou(confusion(np.stack(values), truth, len(CLASSES)))}


def _patches(values: list[Any], scenes: TeacherScenes, numbers: range) -> dict[str, float]:
    """How well a linear map reads a solid's attributes from the patch at whose centre it is."""
    from tasks.teachers.clip import patch_targets

    features = np.stack(values).astype(np.float64).reshape(len(values), -1, values[0].shape[-1])
    half = len(values) // 2
    scores = {}
    for key, target in patch_targets(scenes, np.array(numbers), False).items():
        wanted = target.numpy()
        seen = wanted >= (CLASSES.index(SHAPES[0]) if key == "shape" else 1)
        train, test = (features[part][seen[part]] for part in (slice(half), slice(half, None)))
        known, asked = wanted[:half][seen[:half]], wanted[half:][seen[half:]]
        centre = train.mean(0)
        gram = (train - centre).T @ (train - centre) + np.eye(train.shape[1])
        onehot = np.eye(wanted.max() + 1)[known]
        weights = np.linalg.solve(gram, (train - centre).T @ (onehot - onehot.mean(0)))
        guess = ((test - centre) @ weights + onehot.mean(0)).argmax(1)
        scores[key] = float((guess == asked).mean())
    return scores


_SCORES: dict[str, Callable[[list[Any], TeacherScenes, range], dict[str, float]]] = {
    "depth": _depth,
    "normal": _normal,
    "semseg": _semseg,
    "clip": _patches,
    "dinov2": _patches,
}


def check(spec: LabelerSpec, scenes: TeacherScenes, count: int = HELD_OUT) -> dict[str, float]:
    """Score a labeler of maps or features on the last scenes of a set, which it did not train on.

    Returns:
        Its metrics, and "images_per_second".
    """
    numbers = range(len(scenes) - count, len(scenes))
    labeler = load_labeler(spec)
    images = [np.ascontiguousarray(scenes.rgb[number]) for number in numbers]
    labeler.label(images[: spec.batch_size])  # the first batch sets the kernels up
    started = time.monotonic()
    values = labeler.label(images)[spec.name]
    speed = count / (time.monotonic() - started)
    return {**_SCORES[spec.name](values, scenes, numbers), "images_per_second": speed}
