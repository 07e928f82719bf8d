"""Scores of poses and instances by hand-worked cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from models.modalities.sam_instance import instance
from tasks.evaluation.baseline import constant
from tasks.evaluation.scores import FROM_RGB, MEASURED, instance_scores, pose_scores
from tasks.evaluation.truth import Truth
from tasks.metrics import keypoints_right, mask_overlap


def person(left: float, seen: int = 17, shift: float = 0.0) -> dict[str, Any]:
    """A person in a box of 0.3 x 0.4, whose diagonal is 0.5, with its first keypoints seen."""
    points = [[left + 0.1 + shift, 0.3, 0.9 if i < seen else 0.0] for i in range(17)]
    return {"box": [left, 0.2, left + 0.3, 0.6], "score": 0.9, "keypoints": points}


def masks(*columns: tuple[int, int]) -> dict[str, Any]:
    """Bands of whole columns of a picture of 10 x 10."""
    found = []
    for first, last in columns:
        mask = np.zeros((10, 10), bool)
        mask[:, first:last] = True
        found.append(instance(mask, 0.9))
    return {"size": [10, 10], "instances": found}


def test_keypoints_count_within_a_tenth_of_the_diagonal() -> None:
    assert keypoints_right([person(0.1)], [person(0.1)]) == 1
    assert keypoints_right([person(0.1, shift=0.045)], [person(0.1)]) == 1
    assert keypoints_right([person(0.1, shift=0.06)], [person(0.1)]) == 0
    assert keypoints_right([], []) == 1
    assert keypoints_right([], [person(0.1)]) == keypoints_right([person(0.1)], []) == 0


def test_people_are_paired_and_those_too_many_or_unseen_cost() -> None:
    two = [person(0.0), person(0.6)]
    assert keypoints_right(two[::-1], two) == 1
    assert keypoints_right(two[:1], two) == pytest.approx(2 * 17 / (17 + 34))
    assert keypoints_right([person(0.1, seen=10)], [person(0.1)]) == pytest.approx(2 * 10 / 27)


def test_masks_are_held_against_the_best_that_was_predicted() -> None:
    assert mask_overlap(masks((0, 4)), masks((0, 4))) == 1
    assert mask_overlap(masks((0, 2), (5, 9)), masks((0, 4))) == pytest.approx(0.5)
    assert mask_overlap(masks((0, 4)), masks((0, 4), (6, 10))) == pytest.approx(0.5)
    assert mask_overlap(masks(), masks((0, 4))) == 0
    assert mask_overlap(masks(), masks()) == 1
    assert mask_overlap(masks((0, 1)), masks()) == 0


def test_scores_are_means_over_pictures_and_a_constant_finds_nothing() -> None:
    values = {"human_poses": [{"humans": [person(0.1)]}] * 2, "sam_instance": [masks((0, 4))] * 2}
    truth = Truth("labels", [np.zeros((10, 10, 3), np.uint8)] * 2, values, 1, lambda a, b: 1.0)
    found = [{"humans": [person(0.1)]}, {"humans": []}]
    assert pose_scores(found, truth) == {"keypoint_f1": 0.5}
    assert instance_scores([masks((0, 4)), masks()], truth) == {"mask_iou": 0.5}
    for name, score in (("human_poses", pose_scores), ("sam_instance", instance_scores)):
        nothing = constant(name, values[name], truth.similarity)
        assert list(score([nothing] * 2, truth).values()) == [0.0]


def test_every_modality_that_can_be_generated_from_a_picture_has_a_score() -> None:
    from models import modalities

    assert set(MEASURED) == set(modalities.names()) - {"rgb", "t5_caption"}
    assert len({task.name for task in FROM_RGB}) == len(FROM_RGB)
