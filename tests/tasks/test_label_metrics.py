"""Dense metrics on numbers that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.metrics import confusion, depth_metrics, miou, normal_angle
from tokenizers_vq.quality import reconstruction_quality


def test_depth_metrics_skip_pixels_without_truth():
    scores = depth_metrics([1.1, 2.0, 9.0, 3.0], [1.0, 2.0, 0.0, 4.0])
    assert scores["abs_rel"] == pytest.approx((0.1 + 0 + 0.25) / 3)
    assert scores["delta1"] == pytest.approx(2 / 3)


def test_relative_errors_of_depth_are_bounded_where_a_picture_begins():
    """Depth without a scale begins at 0: one such pixel would outweigh all others."""
    scores = depth_metrics([0.02, 0.5], [1 / 65535, 0.5])
    assert scores == pytest.approx({"abs_rel": 0.5, "delta1": 0.5})
    pair = np.array([[0.02, 0.5]]), np.array([[0.0, 0.5]])
    bound = reconstruction_quality("depth", [pair[0]], [pair[1]])
    assert bound == pytest.approx({"abs_rel": 0.5, "delta1": 0.5})


def test_angles_between_vectors_of_any_length():
    assert normal_angle([[0, 0, 2], [1, 0, 0]], [[0, 0, 1], [0, 3, 0]]) == pytest.approx(45)


def test_miou_leaves_out_unlabelled_pixels_and_absent_classes_and_counts_strays_as_wrong():
    counts = confusion([0, 0, 1, 1, 200], [0, 1, 1, 255, 1], 4)
    # class 0: 1 of 2; class 1: 1 of 3; classes 2 and 3 occur nowhere
    assert miou(counts) == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert miou(confusion(np.zeros(0), np.zeros(0), 3)) == 0


def test_unlabelled_is_a_wrong_prediction_and_no_class_of_its_own():
    true = np.repeat(np.arange(2, dtype=np.uint8), 8).reshape(4, 4)
    pred = true.copy()
    pred[0, 0] = 255
    found = reconstruction_quality("semseg", [pred], [true])
    assert found["miou"] == pytest.approx((7 / 8 + 1) / 2)
    assert found["miou"] == pytest.approx(miou(confusion(pred, true, 2)))
