"""Evaluation: rows, gaps, baselines, the loss matrix, the report."""

from __future__ import annotations

import json
import math
import re
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
from tasks.evaluation.matrix import NOTHING, loss_matrix
from tasks.evaluation.rows import Bench
from tasks.evaluation.scores import box_f1, class_f1, gap
from tasks.evaluation.truth import Truth, scene_truth
from tasks.report import task_rows, write_report
from tests.tasks.tiny import SIDE, Coarse, network
from tokenizers_vq.text import train_text_tokenizer


class Knowing:
    """A teacher that knows the truth of the pictures it is shown; of others it says nothing."""

    def __init__(self, name: str, truth: Truth) -> None:
        self.name, self.truth = name, truth

    def label(self, images: list[np.ndarray]) -> dict[str, list[Any]]:
        known = {image.tobytes(): i for i, image in enumerate(self.truth.rgb)}
        nothing: Any = {"det": {"instances": []}, "caption": ""}.get(self.name)
        found = [known.get(image.tobytes()) for image in images]
        values = self.truth.values[self.name]
        return {self.name: [nothing if i is None else values[i] for i in found]}


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
    values = dict(truth.values)
    teachers = {name: Knowing(name, truth) for name in values}
    training = {name: v[:3] for name, v in {**values, "rgb": truth.rgb}.items()}
    generator = Generator(network(text), {n: Coarse(n) for n in names}, text, bf16=False)  # type: ignore
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
    _show(evaluation, bench, EvaluateConfig(shown=2))
    store = Store(str(tmp_path))
    store.write("runs/main/curve.jsonl", b'{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
    write_report(store, "main", evaluation, samples=100, seconds={"train": 90.0})
    found = json.loads(store.read("reports/main/results.json"))
    assert {"commit", "date", "machine", "samples", "seconds", "tasks", "matrix"} <= set(found)
    assert found["seconds"]["total"] == pytest.approx(90, abs=1)
    page = store.read("reports/main/report.html").decode()
    assert "gap recovered" in page
    assert not re.search(r"(src|href)=(?!.data:)", page)
    assert {"reports/main/rgb-to-depth.png", "reports/main/caption-to-rgb.png"} <= set(
        store.list("reports/")
    )
    assert len(task_rows(found["tasks"])) == 2


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="samples must be at least 1"):
        EvaluateConfig(samples=0)
    with pytest.raises(ValueError, match="scenes or labels"):
        EvaluateConfig(truth="guess")  # type: ignore[arg-type]
