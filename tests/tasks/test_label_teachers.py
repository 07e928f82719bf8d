"""Teachers of dense maps: what the shipped ones reach on new scenes, and that recipes run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from infra.scenes import EVAL_SEED, MAX_DEPTH, Rendering, render, sample_scene
from models.labelers import LabelerSpec, load_labeler, preset
from tasks.metrics import confusion, depth_metrics, miou, normal_angle
from tasks.teachers import TEACHERS, teacher
from tasks.teachers.data import SIZE, TeacherScenes, load_scenes, recompress
from tasks.teachers.dense import DepthTeacher, NormalTeacher
from tasks.teachers.teaching import teach

COUNT = 24


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def unseen() -> list[Rendering]:
    return [render(sample_scene(EVAL_SEED + number), SIZE) for number in range(COUNT)]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> TeacherScenes:
    return load_scenes(140, cache=tmp_path_factory.mktemp("scenes"), processes=1)


def labels(kind: str, views: list[Rendering]) -> np.ndarray:
    labeler = load_labeler(preset("scenes")[kind])
    return np.stack(labeler.label([recompress(view.rgb) for view in views])[kind])


def test_shipped_depth_is_within_a_quarter_nearly_everywhere(unseen):
    truth = np.stack([view.depth for view in unseen])
    assert depth_metrics(labels("depth", unseen) * MAX_DEPTH, truth)["delta1"] >= 0.95


def test_shipped_normals_are_within_ten_degrees(unseen):
    truth = np.stack([view.normal for view in unseen])
    assert normal_angle(labels("normal", unseen), truth) <= 10


def test_shipped_segmentation_finds_the_classes(unseen):
    truth = np.stack([view.classes for view in unseen])
    assert miou(confusion(labels("semseg", unseen), truth, 6)) >= 0.85


def test_a_rendered_set_is_kept_and_read_again(scenes, tmp_path):
    first = load_scenes(3, cache=tmp_path, processes=1)
    again = load_scenes(3, cache=tmp_path, processes=1)
    np.testing.assert_array_equal(first.rgb, again.rgb)
    np.testing.assert_array_equal(first.rgb, scenes.rgb[:3])
    assert first.annotations == scenes.annotations[:3]
    np.testing.assert_allclose(np.linalg.norm(first.normal / 127.0, axis=-1), 1, atol=0.02)


def test_held_out_scenes_are_not_trained_on(scenes):
    assert scenes.training == 70


@pytest.mark.parametrize("kind", sorted(TEACHERS))
def test_a_teacher_trains_saves_and_loads_as_a_labeler(scenes, tmp_path, kind):
    teach(teacher(kind)(scenes), tmp_path / "weights", tmp_path / "run", steps=1)
    labeler = load_labeler(LabelerSpec(kind, (kind,), str(tmp_path / "weights")))
    value = labeler.label([np.array(scenes.rgb[0])])[kind][0]
    if kind in ("caption", "det"):
        assert isinstance(value, str if kind == "caption" else dict)
        return
    assert value.shape[:2] == ((8, 8) if kind in ("clip", "dinov2") else (SIZE, SIZE))
    assert np.isfinite(value.astype(np.float32)).all()


def test_an_epoch_shows_every_scene_once_and_each_step_is_the_same_again(scenes):
    learner = DepthTeacher(scenes)
    shown = []
    learner.examples = lambda chosen, rng, mirrored: shown.append(chosen)  # type: ignore
    for step in (0, 1, 2, 3, 0):
        learner.batch(step, 0, 1)
    seen = np.concatenate(shown[:4])
    assert len(set(seen.tolist())) == len(seen) == 4 * DepthTeacher.batch_size
    np.testing.assert_array_equal(shown[0], shown[4])


def test_mirroring_turns_normals_with_the_image(scenes):
    learner, chosen, rng = NormalTeacher(scenes), np.array([0]), np.random.default_rng(0)
    plain = learner.examples(chosen, rng, False)
    turned = learner.examples(chosen, rng, True)
    assert torch.equal(turned["image"], plain["image"].flip(3))
    perfect = turned["normal"].float().permute(0, 3, 1, 2)
    model = lambda _: type("Out", (), {"normals": perfect})  # noqa: E731
    assert learner.loss(model, turned)[0] < 0.02
    expected = plain["normal"].flip(2) * torch.tensor([-1, 1, 1])
    assert torch.equal(turned["normal"].int(), expected.int())
