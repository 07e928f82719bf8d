"""Captions: true to the scene, readable back, and fairly scored."""

import numpy as np
import pytest

from infra.scenes import (
    Camera,
    SceneObject,
    caption,
    caption_score,
    parse_caption,
    render,
    sample_scene,
    scene_caption,
)

CAMERA = Camera((0.0, -7.0, 4.0), (0.0, 0.0, 0.5), 42.0)
TRUTH = "a large red metal cube left of a small blue rubber sphere"


def _attributes(solid: SceneObject) -> dict[str, str]:
    return {k: getattr(solid, k) for k in ("size", "color", "material", "shape")}


@pytest.mark.parametrize("seed", range(30))
def test_captions_read_back_as_the_objects(seed):
    rendering = render(sample_scene(seed))
    assert parse_caption(rendering.caption) == [_attributes(o) for o in rendering.objects]
    assert scene_caption(sample_scene(seed)) == rendering.caption


@pytest.mark.parametrize(
    ("second", "relation"),
    [
        ((1.5, 0.5), "left of"),
        ((0.3, 2.0), "in front of"),
        ((0.3, -2.0), "behind"),
    ],
)
def test_relation_follows_the_ground_as_the_camera_sees_it(second, relation):
    one = SceneObject("cube", "red", "large", "metal", (0.0, 0.0), 0.0, 0.9)
    other = SceneObject("sphere", "blue", "small", "rubber", second, 0.0, 0.5)
    expected = f"a large red metal cube {relation} a small blue rubber sphere"
    assert caption([one, other], CAMERA) == expected


@pytest.mark.parametrize("seed", range(30))
def test_every_relation_holds_in_the_image(seed):
    scene = sample_scene(seed)
    rendering = render(scene)
    _, _, forward = scene.camera.basis()
    text = rendering.caption
    for i, (one, other) in enumerate(
        zip(rendering.objects, rendering.objects[1:], strict=False)
    ):
        nearer = np.subtract(other.position, one.position) @ forward[:2] > 0
        start = text.index(f"{one.color} {one.material} {one.shape} ")
        after = text[start:].split(one.shape, 1)[1].strip()
        text = text[start + len(one.color) :]
        if after.startswith("left of"):
            assert rendering.boxes[i, [0, 2]].sum() <= rendering.boxes[i + 1, [0, 2]].sum()
        else:
            assert after.startswith("in front of" if nearer else "behind")


def test_parsing_ignores_what_it_cannot_read():
    assert parse_caption("") == []
    assert parse_caption("lorem [UNK] ipsum 42 \x00 left left of of") == []
    assert parse_caption("a large zzz red cube!") == [
        {"size": "large", "color": "red", "material": "", "shape": "cube"}
    ]
    found = parse_caption("a large red left of a sphere")
    assert found == [{"size": "", "color": "", "material": "", "shape": "sphere"}]


def test_score_is_one_for_the_truth_in_any_order():
    assert caption_score(TRUTH, TRUTH) == 1
    swapped = "a small blue rubber sphere behind a large red metal cube"
    assert caption_score(swapped, TRUTH) == 1


@pytest.mark.parametrize(
    ("predicted", "score"),
    [
        ("", 0.0),
        ("nonsense", 0.0),
        ("a large red metal cube", 0.5),
        ("a large red metal cube left of a small blue rubber cone", 7 / 8),
        (TRUTH + " left of a large gray metal cone", 8 / 12),
        ("a cube", 1 / 8),
    ],
)
def test_score_is_the_share_of_right_attributes(predicted, score):
    assert caption_score(predicted, TRUTH) == pytest.approx(score)


def test_two_empty_texts_agree():
    assert caption_score("", "an empty room") == 1
