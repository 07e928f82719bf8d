"""File codecs, crops and pictures of every modality of the catalogue."""

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import modalities
from models.crops import CropBox, CropPolicy, crop_box
from models.modalities.base import png

WHOLE = CropBox(0.0, 0.0, 1.0, 1.0)


def example(name: str) -> object:
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(32, 32, 3)).astype(np.float32)
    return {
        "rgb": np.full((32, 32, 3), 90, np.uint8),
        "depth": rng.random((32, 32), np.float32),
        "normal": normal / np.linalg.norm(normal, axis=-1, keepdims=True),
        "semseg": rng.integers(0, 6, (32, 32), dtype=np.uint8),
        "caption": "a small red cube",
        "clip": rng.normal(size=(8, 8, 16)).astype(np.float16),
        "det": {"instances": [{"box": [0.1, 0.2, 0.5, 0.6], "class_name": "cube", "score": 0.9}]},
        "canny_edge": rng.integers(0, 2, (32, 32), dtype=np.uint8) * 255,
        "color_palette": {str(n): [[i, 10 * i, 255 - i] for i in range(n)] for n in range(1, 8)},
        "metadata": {"original_width": 640, "entropy": 5.5, "n_humans": 0},
        "dinov2": rng.normal(size=(4, 6, 16)).astype(np.float16),
        "dinov2_global": rng.normal(size=16).astype(np.float16),
        "imagebind": rng.normal(size=(4, 6, 16)).astype(np.float16),
        "imagebind_global": rng.normal(size=16).astype(np.float16),
        "t5_caption": rng.normal(size=(5, 16)).astype(np.float16),
        "sam_edge": rng.integers(0, 256, (32, 32), dtype=np.uint8),
        "sam_instance": {
            "size": [32, 32],
            "instances": [
                {"box": [4, 8, 10, 20], "score": 0.9, "mask": rng.random((12, 6)) > 0.3},
                {"box": [0, 0, 32, 32], "score": 0.8, "mask": np.ones((32, 32), bool)},
            ],
        },
        "human_poses": {
            "humans": [
                {"box": [0.1, 0.2, 0.5, 0.8], "score": 0.9,
                 "keypoints": [[0.1 + i / 50, 0.2 + i / 50, 0.5] for i in range(17)]},
            ]
        },
    }[name]


def distance(name: str, first: object, second: object) -> float:
    if name == "sam_instance":
        encode = modalities.get(name).encode
        return 0.0 if encode(first) == encode(second) else 1.0
    if name == "human_poses":
        flat = [
            np.array([[*h["box"], *np.ravel(h["keypoints"])] for h in value["humans"]])
            for value in (first, second)
        ]
        return float(np.abs(flat[0] - flat[1]).max())
    if modalities.get(name).kind == "sequence" and not isinstance(first, np.ndarray):
        return 0.0 if first == second else 1.0
    return float(np.abs(np.asarray(first, float) - np.asarray(second, float)).max())


TOLERANCE = {"rgb": 2.0, "depth": 1 / 65535, "normal": 0.012}


@pytest.mark.parametrize("name", modalities.names())
def test_decode_inverts_encode_within_the_format_s_quantisation(name):
    modality, value = modalities.get(name), example(name)
    assert distance(name, modality.decode(modality.encode(value)), value) <= TOLERANCE.get(name, 0)


@pytest.mark.parametrize("name", modalities.names())
def test_encoding_the_same_value_twice_gives_the_same_bytes(name):
    modality = modalities.get(name)
    assert modality.encode(example(name)) == modality.encode(example(name))


@pytest.mark.parametrize("name", modalities.names())
def test_the_whole_window_is_the_identity(name):
    value = example(name)
    assert distance(name, modalities.get(name).crop(value, WHOLE, 32), value) <= 1e-5


@pytest.mark.parametrize("name", modalities.names())
def test_every_modality_renders_as_a_colour_picture(name):
    picture = modalities.get(name).render(example(name))
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.shape[2] == 3


def test_an_unknown_modality_is_refused_with_the_valid_choices():
    with pytest.raises(ValueError, match="'thermal'; choose from canny_edge, caption, clip"):
        modalities.get("thermal")


def test_a_flip_mirrors_boxes_and_turns_the_normals_around():
    flipped = CropBox(0.0, 0.0, 1.0, 1.0, hflip=True)
    det = modalities.get("det").crop(example("det"), flipped, 32)
    assert det["instances"][0]["box"] == pytest.approx([0.5, 0.2, 0.9, 0.6])
    normal = example("normal")
    turned = modalities.get("normal").crop(normal, flipped, 32)
    assert np.allclose(turned[..., 0], -normal[:, ::-1, 0], atol=1e-5)


def test_boxes_outside_the_window_are_dropped():
    left = CropBox(0.0, 0.6, 1.0, 0.4)
    assert modalities.get("det").crop(example("det"), left, 32)["instances"] == []


@given(
    st.text("0123456789", min_size=1, max_size=12),
    st.integers(0, 7),
    st.floats(0.2, 5.0),
    st.floats(0.05, 1.0),
)
@settings(max_examples=200, deadline=None)
def test_crops_are_pure_and_stay_inside_the_image(key, index, aspect, scale):
    policy = CropPolicy(num_crops=8, min_scale=scale, hflip=True)
    box = crop_box(policy, key, index, aspect)
    assert box == crop_box(policy, key, index, aspect)
    assert 0 <= box.top <= box.top + box.height <= 1 + 1e-9
    assert 0 <= box.left <= box.left + box.width <= 1 + 1e-9
    if index == 0:
        assert not box.hflip
        assert box.width * aspect == pytest.approx(box.height)


def test_a_crop_that_the_policy_does_not_have_is_refused():
    with pytest.raises(ValueError, match="crop 4 does not exist"):
        crop_box(CropPolicy(num_crops=4), "0", 4)


def whole_npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def cut_png():
    whole = png(np.arange(4096, dtype=np.uint8).reshape(64, 64))
    return whole[:60] + b"\0\0\0\x04\xff\xff\xff\xff" + whole[80:]


def boxes(**changes):
    each = {"box": [0, 0, 1, 1], "class_name": "dog"} | changes
    return json.dumps({"instances": [each]}).encode()


def masks(size=(9, 9), number=1, **changes):
    each = {"box": [0, 0, 2, 1], "score": 1, "counts": [1, 1]} | changes
    return json.dumps({"size": size, "instances": [each] * number}).encode()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("color_palette", b'{"1": [[0, 0, 0]]}', "list of one object"),
        ("color_palette", b'[{"2": [[0, 0, 0]]}]', "n colours"),
        ("color_palette", b'[{"1": [[0, 0, 256]]}]', "n colours"),
        ("metadata", b'{"width": 3}', "no field 'width'; there are original_width"),
        ("metadata", b'{"entropy": NaN}', "entropy is nan, not a finite number"),
        ("metadata", b"[]", "object of fields"),
        ("sam_instance", b"[]", "'size' and 'instances'"),
        (
            "sam_instance",
            b'{"size": [9, 9], "instances": [{"box": [0, 0, 10, 1], "score": 1, "counts": [0]}]}',
            "lie in",
        ),
        (
            "sam_instance",
            b'{"size": [9, 9], "instances": [{"box": [0, 0, 2, 1], "score": 1, "counts": [1, 9]}]}',
            "add up",
        ),
        ("sam_instance", b'{"size": [99999, 99999], "instances": []}', "99999 x 99999"),
        ("human_poses", b"{}", "list 'humans'"),
        ("human_poses", b'{"humans": [{"keypoints": [[0, 0, 1]]}]}', "17 keypoints"),
        ("human_poses", b'{"humans": [{}]}', "17 keypoints"),
        ("sam_instance", b'{"instances": []}', "'size' and 'instances'"),
        ("sam_instance", b'{"size": [9, 9], "instances": [{}]}', "'box', 'score' and 'counts'"),
        ("depth", png(np.zeros((4, 4), np.uint8)), "PNG of mode L, not I;16"),
        ("depth", png(np.zeros((4, 4, 3), np.uint8)), "PNG of mode RGB, not I;16"),
        ("semseg", png(np.full((4, 4), 300, np.uint16)), "PNG of mode I;16, not L"),
        ("semseg", png(np.zeros((4, 4, 3), np.uint8)), "PNG of mode RGB, not L"),
        ("normal", png(np.zeros((4, 4), np.uint8)), "PNG of mode L, not RGB"),
        ("t5_caption", modalities.get("clip").encode(np.zeros((78, 4))), "1 to 77 rows"),
        ("dinov2", b"\x93NUMPY junk", "version"),
        ("dinov2", modalities.get("dinov2_global").encode(np.zeros(4)), "floats of 3 dimensions"),
        ("clip", whole_npy(np.zeros((2, 2, 3), int)), "floats of 3 dimensions, not int64"),
        ("imagebind_global", whole_npy(np.full(3, np.nan)), "not a finite number"),
        ("depth", cut_png(), "broken|truncated"),
        ("semseg", cut_png(), "broken|truncated"),
        ("det", b"[" * 100_000, "nested too deep"),
        ("det", boxes(score="high"), "a score that is a number"),
        ("det", boxes(box=[0, 0, 1, float("nan")]), "box of four numbers"),
        ("det", boxes(box=[0, 0, 1, 10**400]), "box of four numbers"),
        ("metadata", b'{"entropy": 1' + b"0" * 400 + b"}", "not a finite number"),
        ("human_poses", b'{"humans": [null]}', "17 keypoints"),
        ("human_poses", json.dumps({"humans": [{"keypoints": [["0", 0, 0]] * 17}]}).encode(),
         "17 keypoints"),
        ("sam_instance", b'{"size": 3, "instances": []}', "two whole numbers"),
        ("sam_instance", b'{"size": [9.5, 9], "instances": []}', "two whole numbers"),
        ("sam_instance", masks(box=[0, 0, 2, 1.5]), "all of numbers"),
        ("sam_instance", masks(score="high"), "all of numbers"),
        ("sam_instance", masks(counts=[0.5, 1.5]), "whole numbers"),
        ("sam_instance", masks(counts=[[1], [1]]), "whole numbers"),
        # Their sum is 2 in 64 bits.
        ("sam_instance", masks(counts=[2**62, 2**62, 2**62, 2**62, 2]), "do not add up"),
    ],
)
def test_a_file_that_holds_something_else_is_refused_by_what_is_wrong(name, data, message):
    with pytest.raises(ValueError, match=message):
        modalities.get(name).decode(data)


def test_metadata_names_the_21_fields_in_the_order_of_the_released_types():
    from models.modalities.metadata import FIELDS

    assert len(set(FIELDS)) == 21
    assert FIELDS[9:15] == (
        "colorfulness", "brightness", "contrast", "saturation", "entropy", "walkability",
    )  # fmt: skip


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_any_mask_survives_its_run_lengths(height, width, bits):
    from models.modalities.sam_instance import instance

    mask = np.random.default_rng(bits).random((height, width)) < bits % 5 / 4
    found = instance(mask, 0.5)
    assert (found is None) == (not mask.any())
    if found:
        modality = modalities.get("sam_instance")
        value = {"size": [height, width], "instances": [found]}
        (again,) = modality.decode(modality.encode(value))["instances"]
        left, top, right, bottom = again["box"]
        full = np.zeros_like(mask)
        full[top:bottom, left:right] = again["mask"]
        np.testing.assert_array_equal(full, mask)


def test_instances_of_a_crop_are_in_its_pixels_and_hidden_ones_are_gone():
    value = example("sam_instance")
    right = modalities.get("sam_instance").crop(value, CropBox(0.0, 0.5, 1.0, 0.5), 64)
    assert right["size"] == [64, 64]
    (only,) = right["instances"]
    assert only["box"] == [0, 0, 64, 64]
    flipped = modalities.get("sam_instance").crop(value, CropBox(0, 0, 1, 1, hflip=True), 32)
    assert flipped["instances"][0]["box"][0] >= 22


def test_500_instances_are_stored_and_rendered():
    from models.modalities.sam_instance import instance

    masks = [np.zeros((50, 50), bool) for _ in range(500)]
    for number, mask in enumerate(masks):
        mask[number // 10, 5 * (number % 10) : 5 * (number % 10) + 2] = True
    value = {"size": [50, 50], "instances": [instance(mask, 0.9) for mask in masks]}
    modality = modalities.get("sam_instance")
    assert len(modality.decode(modality.encode(value))["instances"]) == 500
    assert len(modality.crop(value, WHOLE, 50)["instances"]) == 500
    picture = modality.render(value)
    assert picture.shape == (50, 50, 3)
    assert (picture[0, 0] != picture[0, 3]).any()


def test_the_stretched_mask_of_an_instance_is_what_its_tokenizer_sees():
    from models.modalities.sam_instance import instance, patch

    mask = np.zeros((20, 30), bool)
    mask[5:15, 10:20] = True
    mask[5:15, 20:30] = False
    assert patch(instance(mask, 1.0)).shape == (64, 64)
    assert patch(instance(mask, 1.0)).min() == 1


def test_a_mirror_turns_left_keypoints_into_right_ones():
    value = example("human_poses")
    flipped = modalities.get("human_poses").crop(value, CropBox(0, 0, 1, 1, hflip=True), 32)
    before, after = value["humans"][0]["keypoints"], flipped["humans"][0]["keypoints"]
    assert after[0][:2] == pytest.approx([1 - before[0][0], before[0][1]])
    assert after[5][:2] == pytest.approx([1 - before[6][0], before[6][1]])
    gone = modalities.get("human_poses").crop(value, CropBox(0, 0.6, 1, 0.4), 32)
    assert gone["humans"] == []


def test_a_stored_feature_file_never_unpickles():
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for name in ("clip", "dinov2_global", "t5_caption"):
        with pytest.raises(ValueError, match="pickled objects"):
            modalities.get(name).decode(buffer.getvalue())


def test_the_page_of_all_modalities_is_current():
    from pathlib import Path

    from models.modalities.__main__ import RELEASED, document

    page = Path(__file__).resolve().parents[2] / "docs" / "modalities.md"
    assert page.read_text() == document(), "run python -m models.modalities > docs/modalities.md"
    assert set(RELEASED) == set(modalities.names())


def test_masks_that_take_more_memory_than_any_picture_are_refused():
    side = 8000
    few = masks((side, side), 1, box=[0, 0, side, side], counts=[0, side**2])
    assert modalities.get("sam_instance").decode(few)["instances"][0]["mask"].all()
    many = masks((side, side), 9, box=[0, 0, side, side], counts=[0, side**2])
    with pytest.raises(ValueError, match="masks of more than 512000000 pixels"):
        modalities.get("sam_instance").decode(many)
