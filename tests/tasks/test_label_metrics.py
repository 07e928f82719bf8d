"""Dense metrics on numbers that can be checked by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from models.fourm.ensemble import box_iou, vote_boxes, word_overlap
from tasks.evaluation import truth as truths
from tasks.evaluation.baseline import constant
from tasks.evaluation.scores import box_f1, class_f1, semseg_scores
from tasks.metrics import (
    class_of,
    confusion,
    depth_metrics,
    edge_f1,
    mean_cosine,
    miou,
    normal_angle,
    palette_distance,
    recall,
)
from tokenizers_vq.quality import reconstruction_quality
from tokenizers_vq.sequences.boxes import det_to_string, read_boxes, string_to_det
from tokenizers_vq.sequences.captions import string_to_caption
from tokenizers_vq.text import train_text_tokenizer


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


def test_mean_cosine_is_that_of_vectors_of_any_length():
    assert mean_cosine([[[3, 4], [0, 2]]], [[[6, 8], [5, 0]]]) == pytest.approx(0.5)


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


def test_miou_against_labels_does_not_depend_on_how_classes_are_numbered(monkeypatch):
    """A class that only predictions hold counts, be its id above or between those of the truth."""
    dataset, found = SimpleNamespace(sources={"semseg": None}), []
    for absent, present in ((1, 2), (2, 1)):
        fact = np.array([[0, 0, present, present]], np.uint8)
        values = {"rgb": [np.zeros((1, 4, 3), np.uint8)], "semseg": [fact]}
        monkeypatch.setattr(truths, "read_centred", lambda *_, values=values: values)
        truth = truths.label_truth(dataset, ["semseg"], [0], 1)
        guess = np.where(fact == 0, np.array([[0, absent, 0, 0]]), fact).astype(np.uint8)
        found.append(semseg_scores([guess], truth)["miou"])
    assert found == pytest.approx([(1 / 2 + 1 + 0) / 3] * 2)


@pytest.mark.parametrize(("count", "width"), [(7, 100), (7, 768), (10, 100), (10, 333)])
def test_equal_vectors_are_lost_wherever_they_stand_in_the_gallery(count, width):
    rng = np.random.default_rng(count)
    gallery = np.tile(rng.standard_normal(width), (count, 1))
    assert recall(rng.standard_normal((count, width)), gallery) == [0, 0]


def test_pictures_without_edges_are_right_without_edges():
    none, some = np.zeros((2, 8, 8), np.uint8), np.full((2, 8, 8), 255, np.uint8)
    assert edge_f1(none, none) == 1
    assert edge_f1(some, none) == edge_f1(none, some) == 0


@pytest.mark.parametrize("name", ["Traffic Light", "tv/monitor", "Café", "hot-dog", "日本", "N/A"])
def test_a_class_is_the_same_after_its_way_through_tokens(name):
    text = train_text_tokenizer(["a red cube"], class_names=[name], bins=4, vocab_size=300)
    line = det_to_string([{"box": [0, 0, 1, 1], "class_name": name}], bins=4)
    ids = text.encode(line)
    (read,) = string_to_det(text.decode(ids), bins=4)["instances"]
    (scored,) = read_boxes(ids, np.ones(len(ids)), text)
    assert class_of(read) == class_of(scored) == class_of({"class_name": name})


def test_a_class_is_the_same_in_capitals_as_texts_cannot_tell_them():
    def boxes(*names):
        return {"instances": [{"box": [0.1, 0.2, 0.5, 0.6], "class_name": n} for n in names]}

    assert box_f1([boxes("person")], [boxes("Person")]) == 1
    assert class_f1([boxes("person", "car")], [boxes("Person", "Bus")]) == 0.5


def test_palettes_that_not_all_pictures_have_are_held_against_the_nearest():
    few = {"1": [[0, 0, 0]], "3": [[0, 0, 0], [9, 9, 9], [30, 40, 0]]}
    assert palette_distance({"2": [[0, 0, 0], [0, 0, 0]]}, {"1": [[30, 40, 0]]}) == 50
    assert palette_distance({"3": few["3"], "1": [[3, 0, 4]]}, few) == pytest.approx(2.5)
    assert palette_distance({"1": [[3, 0, 4]]}, {}) == 5
    means = constant("color_palette", [{}, few, {"1": [[10, 0, 0]]}], lambda a, b: 1.0)
    assert means == {"1": [[5, 0, 0]], "3": few["3"]}


def test_captions_are_compared_without_capitals_and_punctuation_which_tokens_do_not_keep():
    corpus = ["A black-and-white Dog, on the Café's Beach."] * 3
    text = train_text_tokenizer(corpus, bins=2, vocab_size=300)
    told = string_to_caption(text.decode(text.encode(corpus[0])))
    assert told != corpus[0]
    assert word_overlap(told, corpus[0]) == 1
    assert word_overlap("a dog", "A cat.") == pytest.approx(1 / 3)


def test_overlaps_of_boxes_side_by_side_inside_and_apart():
    first = np.array([[0.0, 0.0, 0.4, 0.4], [0.0, 0.0, 0.0, 0.0]])
    second = np.array([[0.2, 0.0, 0.6, 0.4], [0.1, 0.1, 0.3, 0.3], [0.5, 0.5, 0.9, 0.9]])
    assert box_iou(first, second) == pytest.approx(np.array([[1 / 3, 1 / 4, 0], [0, 0, 0]]))


def test_of_a_sample_that_sees_an_object_twice_the_box_nearest_to_the_others_votes():
    near, off = [0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.5, 0.6]

    def seen(*boxes):
        return {"instances": [{"box": box, "class_name": "cube", "score": 1.0} for box in boxes]}

    first, second = vote_boxes([seen(near), seen(off, near), seen(near)])["instances"]
    assert first["box"] == pytest.approx(near)
    assert (first["score"], second["score"]) == pytest.approx((1, 1 / 3))
    assert second["box"] == pytest.approx(off)
