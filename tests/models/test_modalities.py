"""File codecs, crops and pictures of every modality of the catalogue."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import modalities
from models.crops import CropBox, CropPolicy, crop_box

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
    }[name]


def distance(name: str, first: object, second: object) -> float:
    if name in ("caption", "det"):
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
    with pytest.raises(ValueError, match="'thermal'; choose from caption, clip, depth"):
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
