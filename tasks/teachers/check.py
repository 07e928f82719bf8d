"""What the shipped teachers reach: labels of held-out scenes, made as the pipeline makes them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from infra.scenes import CLASSES, MAX_DEPTH
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


_SCORES: dict[str, Callable[[list[Any], TeacherScenes, range], dict[str, float]]] = {
    "depth": _depth,
    "normal": _normal,
    "semseg": _semseg,
}


def check(spec: LabelerSpec, scenes: TeacherScenes, count: int = HELD_OUT) -> dict[str, float]:
    """Score a dense labeler on the last `count` scenes of a set, none of which it trained on.

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
