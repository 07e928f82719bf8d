"""Labels that are computed: palettes, Canny edges, metadata; exact, and defined for any picture."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from models import modalities
from models.labelers import LabelerSpec, load_labeler, preset
from models.labelers.base import COMPUTED, Labeler
from models.labelers.canny import canny, grey
from models.labelers.palette import palettes
from models.modalities.metadata import FIELDS

KINDS = ("color_palette", "canny_edge", "metadata")


def labeler(kind: str, **options: Any) -> Labeler:
    return load_labeler(
        LabelerSpec(kind, (kind,), COMPUTED, batch_size=4, device="cpu", precision="fp32",
                    options=options)
    )  # fmt: skip


def label(kind: str, *images: np.ndarray, **options: Any) -> list[Any]:
    samples = [{"rgb": image} for image in images]
    return labeler(kind, **options).label_samples(samples)[kind]


def stripes(*colors: tuple[int, int, int], width: int = 10) -> np.ndarray:
    return np.repeat(np.array([colors], np.uint8), width, axis=1).repeat(20, axis=0)


# --- palettes ---------------------------------------------------------------------------------


def test_a_palette_of_as_many_colours_as_there_are_is_exact_and_most_frequent_first():
    image = stripes((200, 0, 0), (200, 0, 0), (0, 0, 200), (200, 0, 0), (0, 0, 200), (0, 90, 0))
    found = label("color_palette", image)[0]
    assert found["3"] == [[200, 0, 0], [0, 0, 200], [0, 90, 0]]
    assert found["1"] == [[100, 15, 67]]


def test_a_palette_larger_than_the_number_of_colours_repeats_them():
    found = label("color_palette", stripes((1, 2, 3), (9, 9, 9), (1, 2, 3)))[0]
    assert found["5"] == [[1, 2, 3], [9, 9, 9], [1, 2, 3], [9, 9, 9], [1, 2, 3]]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=30, unique=True),
    st.randoms(use_true_random=False),
)
def test_palettes_hold_n_colours_each_and_more_colours_never_fit_worse(colors, random):
    weights = np.array([random.randint(1, 50) for _ in colors], float)
    points = np.array(sorted(colors), float)
    found = palettes(points, weights, 20)
    errors = []
    for number in range(1, 8):
        chosen = np.array(found[str(number)], float)
        assert chosen.shape == (number, 3)
        assert chosen.min() >= 0
        assert chosen.max() <= 255
        distance = ((points[:, None] - chosen) ** 2).sum(-1).min(1)
        errors.append((distance * weights).sum() / weights.sum())
    # Rounding to integers moves each centre by at most half a level in each channel.
    assert all(more <= fewer + 3 * 0.25 + 1e-6 for fewer, more in pairwise(errors))


# --- Canny ------------------------------------------------------------------------------------


def slow_canny(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Pixel by pixel, and edges grown one neighbour at a time."""
    height, width = image.shape
    padded = np.pad(image.astype(float), 1, mode="edge")
    size = np.zeros((height + 2, width + 2))
    slope = np.zeros((height, width, 2))
    for y in range(height):
        for x in range(width):
            part = padded[y : y + 3, x : x + 3]
            dx = (part[:, 2] - part[:, 0]) @ [1, 2, 1]
            dy = (part[2] - part[0]) @ [1, 2, 1]
            slope[y, x] = dx, dy
            size[y + 1, x + 1] = abs(dx) + abs(dy)
    weak = np.zeros((height, width), bool)
    for y in range(height):
        for x in range(width):
            dx, dy = slope[y, x]
            angle = np.degrees(np.arctan2(dy, dx)) % 180
            step = {0: (0, 1), 1: (1, 1), 2: (1, 0), 3: (1, -1)}[int((angle + 22.5) // 45) % 4]
            here = size[y + 1, x + 1]
            before = size[y + 1 - step[0], x + 1 - step[1]]
            after = size[y + 1 + step[0], x + 1 + step[1]]
            weak[y, x] = here > low and here > before and here >= after
    edge = weak & (size[1:-1, 1:-1] > high)
    while True:
        around = np.pad(edge, 1)
        near = np.zeros_like(edge)
        for down in range(3):
            for right in range(3):
                near |= around[down : down + height, right : right + width]
        grown = edge | (near & weak)
        if np.array_equal(grown, edge):
            return edge
        edge = grown


@pytest.mark.parametrize("seed", range(4))
def test_edges_equal_those_of_the_pixelwise_definition(seed):
    rng = np.random.default_rng(seed)
    smooth = np.asarray(
        Image.fromarray(rng.integers(0, 256, (7, 9), np.uint8)).resize((24, 20)), np.float32
    )
    both = np.stack([smooth, rng.integers(0, 256, smooth.shape).astype(np.float32)])
    found = canny(both, 100, 200)
    for image, edge in zip(both, found, strict=True):
        np.testing.assert_array_equal(edge, slow_canny(image, 100, 200))
    assert 0 < found[0].mean() < 0.5


def test_a_step_is_one_pixel_wide_and_edges_do_not_leak_into_the_next_image():
    step = stripes((0, 0, 0), (255, 255, 255))
    faint = stripes((0, 0, 0), (30, 30, 30))  # a gradient of 120: only continues an edge
    edges, none = label("canny_edge", step, faint)
    assert edges.dtype == np.uint8
    assert set(np.unique(edges)) == {0, 255}
    assert (edges[:, 9] == 255).all()
    assert edges.sum() == 255 * 20
    assert not none.any()


def test_thresholds_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match="0 < low <= high"):
        labeler("canny_edge", low=300)


def test_a_blur_removes_noise_that_looked_like_edges():
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    sharp, soft = (label("canny_edge", noise, sigma=sigma)[0].mean() for sigma in (0, 2))
    assert soft < sharp / 2


# --- metadata ---------------------------------------------------------------------------------


def sample() -> dict[str, Any]:
    boxes = [("person", 0.9), ("person", 0.5), ("dog", 0.8), ("dog", 0.7)]
    instances = [
        {"box": [0, 0, 1, 1], "class_name": name, "score": score} for name, score in boxes
    ]
    semseg = np.full((4, 4), 100, np.uint8)  # a road,
    semseg[0], semseg[1] = 0, 255  # a person and a row that is unlabelled
    depth = np.full((4, 4), 0.2, np.float32)
    depth[:, 2:] = 0.8
    normal = np.zeros((4, 4, 3), np.float32)
    normal[:2, :, 2] = normal[2:, :, 1] = 1
    return {
        "rgb": stripes((0, 0, 0), (255, 255, 255)),
        "caption": "Two dogs. One man!",
        "det": {"instances": instances},
        "human_poses": {"humans": [{}, {}, {}]},
        "sam_instance": {"size": [4, 4], "instances": [{}] * 500},
        "semseg": semseg,
        "depth": depth,
        "normal": normal,
    }


def test_every_field_but_the_two_of_web_lists_has_its_value():
    found = labeler("metadata").label_samples([sample()])["metadata"][0]
    assert set(FIELDS) - set(found) == {"watermark_score", "aesthetic_score"}
    expected = {
        "original_width": 20, "original_height": 20, "caption_n_chars": 18, "caption_n_words": 4,
        "caption_n_sentences": 2, "n_humans": 3, "n_sam_instances": 500, "n_coco_instances": 3,
        "coco_instance_diversity": 2, "colorfulness": 0.0, "brightness": 127.5, "contrast": 127.5,
        "saturation": 0.0, "entropy": 1.0, "walkability": 8 / 12, "objectness": 4 / 12,
        "semantic_diversity": 2, "geometric_complexity": 1 - np.sqrt(0.5), "occlusion_score": 0.25,
    }  # fmt: skip
    assert found == pytest.approx(expected, abs=1e-5)
    modality = modalities.get("metadata")
    assert modality.decode(modality.encode(found)) == found


def test_fields_of_missing_labels_are_absent_and_others_do_not_change():
    whole = sample()
    full = labeler("metadata").label_samples([whole])["metadata"][0]
    del whole["human_poses"], whole["depth"]
    less = labeler("metadata").label_samples([whole])["metadata"][0]
    assert full.keys() - less.keys() == {"occlusion_score"}
    assert less == {**{k: v for k, v in full.items() if k in less}, "n_humans": 1}


def test_colourfulness_is_that_of_hasler_and_suesstrunk():
    image = stripes((255, 0, 0), (0, 0, 255))
    # rg = 255, 0 and yb = 127.5, -255: means 127.5, -63.75 and deviations 127.5, 191.25
    expected = np.hypot(127.5, 191.25) + 0.3 * np.hypot(127.5, 63.75)
    found = label("metadata", image)[0]
    assert found["colorfulness"] == pytest.approx(expected, rel=1e-4)
    assert found["saturation"] == pytest.approx(255)


@pytest.mark.parametrize(
    ("text", "words", "sentences"),
    [("", 0, 0), ("  ", 0, 0), ("...", 1, 0), ("one", 1, 1), ("a b! c? d", 4, 3), ("x.", 1, 1)],
)
def test_words_and_sentences_of_any_caption(text, words, sentences):
    rgb = stripes((0, 0, 0))
    found = labeler("metadata").label_samples([{"rgb": rgb, "caption": text}])["metadata"][0]
    assert (found["caption_n_words"], found["caption_n_sentences"]) == (words, sentences)


def test_scenes_count_their_own_classes():
    spec = preset("scenes")["metadata"]
    semseg = np.array([[0, 1, 2, 5]], np.uint8)
    samples = [{"rgb": stripes((0, 0, 0)), "semseg": semseg}]
    found = load_labeler(spec).label_samples(samples)["metadata"][0]
    assert (found["walkability"], found["objectness"]) == (0.25, 0.5)


# --- any picture ------------------------------------------------------------------------------


def stored(mode: str, size: tuple[int, int], form: str) -> np.ndarray:
    """A picture of another mode, as it comes back from its file."""
    rng = np.random.default_rng(0)
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], bands) if bands > 1 else (size[1], size[0])
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode).save(buffer, form)
    return modalities.get("rgb").decode(buffer.getvalue())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("mode", "size", "form"),
    [
        ("RGB", (1, 1), "PNG"), ("L", (17, 1), "PNG"), ("LA", (9, 8), "PNG"),
        ("RGBA", (8, 9), "PNG"), ("CMYK", (16, 8), "JPEG"), ("L", (8, 8), "JPEG"),
    ],
)  # fmt: skip
def test_pictures_of_one_pixel_grey_alpha_and_cmyk_have_labels(kind, mode, size, form):
    image = stored(mode, size, form)
    value = label(kind, image)[0]
    modality = modalities.get(kind)
    assert modality.encode(modality.decode(modality.encode(value))) == modality.encode(value)
    if kind == "canny_edge":
        assert value.shape == image.shape[:2]
    if kind == "color_palette" and size == (1, 1):
        assert value["7"] == [image[0, 0].tolist()] * 7


def test_twenty_megapixels_are_looked_at_thinned_out():
    image = np.zeros((4000, 5000, 3), np.uint8)
    image[:, 2500:] = 255
    assert sorted(label("color_palette", image)[0]["2"]) == [[0, 0, 0], [255, 255, 255]]
    found = label("metadata", image)[0]
    assert (found["original_width"], found["brightness"]) == (5000, pytest.approx(127.5, abs=0.2))


def test_grey_is_luma():
    image = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    assert grey(image).tolist() == [[76, 150, 29]]
