"""Evaluation: rows, gaps, baselines, the loss matrix, the report."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infra.scenes import CLASSES, SHAPES
from infra.store import Store
from models.fourm.generate import Generator
from tasks import metrics
from tasks.evaluate import EvaluateConfig, Evaluation, _show, _token_values
from tasks.evaluation.baseline import constant
from tasks.evaluation.journey import CHAIN, journey, steps
from tasks.evaluation.matrix import NOTHING, loss_matrix
from tasks.evaluation.retrieval import nearest, retrieval
from tasks.evaluation.rows import Bench
from tasks.evaluation.scores import box_f1, class_f1, gap
from tasks.evaluation.teachers import told
from tasks.evaluation.truth import Truth, scene_truth
from tasks.report import task_rows, write_report
from tests.tasks.tiny import SIDE, Coarse, Codes, network
from tokenizers_vq.text import train_text_tokenizer

VECTOR = 6


class Knowing:
    """A teacher that knows the truth of the pictures it is shown; of others it says nothing."""

    reads, also_reads = ("rgb",), ()

    def __init__(self, name: str, truth: Truth) -> None:
        self.name, self.truth = name, truth

    def label(self, images: list[np.ndarray]) -> dict[str, list[Any]]:
        known = {image.tobytes(): i for i, image in enumerate(self.truth.rgb)}
        nothing: Any = {"det": {"instances": []}, "caption": ""}.get(self.name)
        found = [known.get(image.tobytes()) for image in images]
        values = self.truth.values[self.name]
        return {self.name: [nothing if i is None else values[i] for i in found]}

    def label_samples(self, samples: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return self.label([sample["rgb"] for sample in samples])


@pytest.fixture(scope="module")
def truth() -> Truth:
    return scene_truth(4, SIDE)


@pytest.fixture(scope="module")
def bench(truth: Truth) -> Bench:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    text = train_text_tokenizer(
        truth.values["caption"] * 3, class_names=SHAPES, bins=16, vocab_size=400
    )
    names = ("rgb", "depth", "normal", "semseg")
    vectors = list(np.random.default_rng(0).uniform(-1, 1, (len(truth), VECTOR)))
    truth = replace(truth, values={**truth.values, "dinov2_global": vectors})
    values = dict(truth.values)
    teachers = {name: Knowing(name, truth) for name in values}
    training = {name: v[:3] for name, v in {**values, "rgb": truth.rgb}.items()}
    tokenizers: Any = {**{n: Coarse(n) for n in names}, "dinov2_global": Codes()}
    generator = Generator(network(text, VECTOR), tokenizers, text, bf16=False)
    return Bench(generator, teachers, truth, training, samples=2)  # type: ignore[arg-type]


def boxes(*entries: tuple[str, float]) -> dict[str, Any]:
    return {
        "instances": [
            {"box": [left, 0.2, left + 0.3, 0.6], "class_name": name, "score": 0.9}
            for name, left in entries
        ]
    }


def test_scene_truth_is_of_scenes_nobody_trains_on_and_repeats(truth: Truth) -> None:
    again = scene_truth(1, SIDE)
    assert np.array_equal(again.rgb[0], truth.rgb[0])
    assert truth.classes == len(CLASSES)
    assert 0 < truth.values["depth"][0].min() < truth.values["depth"][0].max() < 1


@pytest.mark.parametrize("name", ["depth", "normal", "semseg", "caption"])
def test_tasks_from_rgb_have_every_row_and_a_perfect_teacher(bench: Bench, name: str) -> None:
    task = next(t for t in bench.tasks_from_rgb() if t.target == name)
    record = bench.from_rgb(task)
    assert set(record) >= {"metric", "lower_is_better", "constant", "teacher", "tokenizer_bound",
                           "fourm", "fourm_10", "gap_recovered"}  # fmt: skip
    perfect = 0 if record["lower_is_better"] else 1
    assert record["teacher"] == pytest.approx(perfect, abs=0.05)
    expected = gap(record["fourm"], record["constant"], record["teacher"])
    assert record["gap_recovered"] == expected


def test_boxes_and_pictures_are_judged_by_the_teacher_detector(bench: Bench) -> None:
    pytest.importorskip("faster_coco_eval")
    record = bench.from_rgb(next(t for t in bench.tasks_from_rgb() if t.target == "det"))
    assert record["constant"] == 0
    assert record["teacher"] == pytest.approx(1)
    for task in bench.tasks_to_rgb():
        made = bench.to_rgb(task, 2)
        assert made["teacher"] == pytest.approx(1)
        assert made["constant"] == 0


def test_tasks_without_labels_or_without_a_place_in_the_model_are_left_out(bench: Bench) -> None:
    few = Bench(bench.generator, {"depth": bench.teachers["depth"]}, bench.truth, bench.training)
    assert [task.name for task in few.tasks_from_rgb()] == ["rgb->depth"]
    assert few.tasks_to_rgb() == []


def test_average_precision_ranks_by_score() -> None:
    pytest.importorskip("faster_coco_eval")
    truth = [boxes(("cube", 0.1)), boxes(("cone", 0.5))]
    assert metrics.detection_ap50(truth, truth) == pytest.approx(1)
    assert metrics.detection_ap50([boxes(), boxes()], truth) == 0
    assert metrics.detection_ap50([boxes(("cube", 0.1)), boxes()], truth) == pytest.approx(0.5)


def test_f1_pairs_each_box_once() -> None:
    fact = boxes(("cube", 0.1), ("cone", 0.5))
    twice = boxes(("cube", 0.1), ("cube", 0.12))
    assert box_f1([fact], [fact]) == 1
    assert box_f1([twice], [fact]) == pytest.approx(0.5)
    assert class_f1([boxes(("cone", 0.0), ("cube", 0.9))], [fact]) == 1
    assert box_f1([boxes()], [boxes()]) == 1


def test_gap_is_0_at_the_constant_and_1_at_the_teacher() -> None:
    assert gap(0.5, 0.5, 0.1) == 0
    assert gap(0.1, 0.5, 0.1) == 1
    assert gap(0.3, 0.5, 0.1) == pytest.approx(0.5)
    assert gap(0.3, 0.5, 0.5) is None


def test_constants_are_the_best_that_ignores_the_input() -> None:
    def same(first: str, second: str) -> float:
        return float(first == second)

    depths = [np.full((2, 2), v, np.float32) for v in (0.1, 0.2, 0.9)]
    assert constant("depth", depths, same) == pytest.approx(np.full((2, 2), 0.2))
    normals = [np.array([[[1.0, 0, 0]]]), np.array([[[0, 1.0, 0]]])]
    assert np.linalg.norm(constant("normal", normals, same)) == pytest.approx(1)
    assert constant("det", [boxes()], same) == {"instances": []}
    assert constant("caption", ["a", "b", "b"], same) in ("a", "b")
    edges = [np.diag([255] * 8).astype(np.uint8) for _ in range(3)]
    assert np.array_equal(constant("canny_edge", edges, same), edges[0])
    palettes = [{"1": [[0, 10, 20]]}, {"1": [[10, 30, 20]]}]
    assert constant("color_palette", palettes, same) == {"1": [[5, 20, 20]]}
    fields = [{"contrast": 1.0}, {"contrast": 5.0, "entropy": 2.0}, {"contrast": 3.0}]
    assert constant("metadata", fields, same) == {"contrast": 3.0, "entropy": 2.0}
    vectors = [np.array([1.0, 0.5]), np.array([0.0, 0.5])]
    assert constant("dinov2_global", vectors, same) == pytest.approx(np.array([0.5, 0.5]))


def test_the_loss_matrix_starts_at_the_logarithm_of_the_vocabulary(bench: Bench) -> None:
    values = {"rgb": bench.truth.rgb, **bench.truth.values}
    matrix = loss_matrix(bench.generator, values)
    assert set(matrix) == {NOTHING, *values}
    assert "rgb" not in matrix["rgb"]
    assert matrix[NOTHING]["depth"] == pytest.approx(math.log(16), abs=0.5)
    assert matrix["depth"]["caption"] == pytest.approx(
        math.log(bench.generator.text.vocab_size), abs=0.8
    )


def test_a_report_is_one_page_and_results_that_hold_what_is_promised(
    bench: Bench, tmp_path: Path
) -> None:
    evaluation = Evaluation(config={"samples": 2})
    for task in bench.tasks_from_rgb():
        if task.target in ("depth", "caption"):
            evaluation.tasks[task.name] = bench.from_rgb(task)
    evaluation.matrix = loss_matrix(bench.generator, _token_values(bench))
    evaluation.retrieval, evaluation.chain = retrieval(bench), journey(bench, 2)
    _show(evaluation, bench, EvaluateConfig(shown=2))
    store = Store(str(tmp_path))
    store.write("runs/main/curve.jsonl", b'{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
    write_report(store, "main", evaluation, samples=100, seconds={"train": 90.0})
    found = json.loads(store.read("reports/main/results.json"))
    assert {"commit", "date", "machine", "samples", "seconds", "tasks", "matrix", "retrieval",
            "chain"} <= set(found)  # fmt: skip
    assert found["seconds"]["total"] == pytest.approx(90, abs=1)
    page = store.read("reports/main/report.html").decode()
    assert "gap recovered" in page
    assert not re.search(r"(src|href)=(?!.data:)", page)
    assert "recall@5" in page
    assert "depth → normal" in page
    shown = ("rgb-to-depth", "caption-to-rgb", "overview", "chain", "search-dinov2_global")
    assert {f"reports/main/{name}.png" for name in shown} <= set(store.list("reports/"))
    assert len(task_rows(found["tasks"])) == 2


def test_a_search_counts_the_rank_of_the_picture_itself_and_draws_count_as_lost() -> None:
    gallery = np.eye(6)
    assert metrics.recall(gallery, gallery) == [1, 1]
    assert metrics.recall(np.roll(gallery, 1, 0), gallery) == [0, 0]
    assert metrics.recall(np.ones((6, 6)), gallery) == [0, 0]
    assert metrics.recall(np.full((6, 6), np.nan), gallery) == [0, 0]
    assert metrics.recall(gallery * 3 + gallery[::-1] * 4, gallery, (1, 2)) == [0, 1]
    assert nearest(np.array([0.1, 0.9, 0.5, 0, 0, 0]), gallery * 7, 3) == [1, 2, 0]


def test_retrieval_searches_from_every_other_modality_and_states_chance(bench: Bench) -> None:
    (name, found), = retrieval(bench).items()
    assert name == "dinov2_global"
    assert found["pictures"] == 4
    assert found["chance"] == {"recall@1": 0.25, "recall@5": 1.0}
    assert found["tokenizer_bound"] == {"recall@1": 1.0, "recall@5": 1.0}
    assert set(found["from"]) == {"rgb", "depth", "normal", "semseg", "caption", "det"}
    for rows in found["from"].values():
        assert set(rows) == {"fourm", "fourm_10"}
        assert all(0 <= row["recall@1"] <= row["recall@5"] <= 1 for row in rows.values())


def test_the_chain_begins_with_the_first_that_is_known_and_is_scored_step_by_step(
    bench: Bench,
) -> None:
    expected = ["rgb", "depth", "normal", "semseg", "det", "caption", "dinov2_global"]
    assert steps(bench) == expected == [name for name in CHAIN if name in expected]
    found = journey(bench, 3)
    assert (found["steps"], found["pictures"]) == (expected, 3)
    assert set(found["scores"]) == set(expected[1:])
    assert set(bench.kept.values["chain"]) == set(expected[1:])
    unknown = replace(bench, truth=replace(bench.truth, values={}))
    assert journey(unknown, 3)["scores"] == {}
    blind = [spec for spec in bench.generator.inputs if spec != "rgb"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(bench.generator), "inputs", blind)
        assert steps(bench)[0] == "depth"
        assert steps(unknown) == []


class Counting:
    """Tells how many of the modalities it may look at were there."""

    reads, also_reads = ("rgb",), ("depth", "det")

    def label_samples(self, samples: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return {"metadata": [len(sample) for sample in samples]}


def test_labelers_that_look_at_labels_see_what_is_known_and_what_others_said(
    truth: Truth,
) -> None:
    teachers: Any = {"metadata": Counting(), "depth": Knowing("depth", truth)}
    rgb = {"rgb": truth.rgb}
    assert told(rgb, teachers, ["metadata"])["metadata"] == [2 - 1] * 4
    assert told(rgb, teachers, ["metadata", "depth"])["metadata"] == [2] * 4
    assert told({**rgb, **truth.values}, teachers, ["metadata"])["metadata"] == [3] * 4
    assert set(told(rgb, teachers, ["normal"])) == {"rgb"}


def test_edges_may_lie_a_pixel_off() -> None:
    line = np.zeros((1, 16, 16), np.uint8)
    line[0, 8] = 255
    assert metrics.edge_f1(line, line) == 1
    assert metrics.edge_f1(np.roll(line, 1, 1), line) == 1
    assert metrics.edge_f1(np.roll(line, 2, 1), line) == 0
    assert metrics.edge_f1(np.roll(line, 2, 1), line, reach=2) == 1
    assert metrics.edge_f1(line * 0, line) == 0


def test_palettes_are_held_against_those_of_as_many_colours() -> None:
    truth = {"1": [[0, 0, 0]], "2": [[255, 255, 255], [0, 0, 0]]}
    assert metrics.palette_distance({"2": [[0, 0, 0], [255, 255, 255]]}, truth) == 0
    assert metrics.palette_distance({"1": [[0, 30, 40]]}, truth) == 50
    assert metrics.palette_distance({}, {"1": [[3, 0, 4]]}) == 5


def test_metadata_is_right_to_the_count_and_to_a_level() -> None:
    truth = {"n_humans": 3, "brightness": 100.0}
    assert metrics.metadata_right(truth, truth) == 1
    assert metrics.metadata_right({"n_humans": 2, "brightness": 104.0}, truth) == 0.5
    assert metrics.metadata_right({"brightness": 120.0}, truth) == 0


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="samples must be at least 1"):
        EvaluateConfig(samples=0)
    with pytest.raises(ValueError, match="scenes or labels"):
        EvaluateConfig(truth="guess")  # type: ignore[arg-type]
