"""Pictures of many shapes in common batches, and at the edge, on tiny real classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from infra.buckets import Buckets
from models import modalities
from models.labelers import LabelerSpec, load_labeler
from models.labelers.base import Labeler
from models.labelers.inputs import Inputs
from tasks.label_work import MOST_PIXELS
from tests.models import test_labeler_caption as captions
from tests.models import test_labeler_detection as detection
from tests.models import test_labelers as dense
from tests.models import test_labelers_features as features
from tests.models import test_labelers_instances as instances
from tests.models.test_labelers_computed import stored

SIZES = [(40, 61), (40, 60), (80, 121), (61, 40), (40, 61), (64, 64), (1, 1), (60, 90), (40, 62)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def checkpoint(build: Callable[[], tuple[Any, Any]]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for part in build():
            part.save_pretrained(folder)

    return write


NETWORKS: dict[str, tuple[str, Callable[[Path], None], dict[str, Any]]] = {
    "depth_anything": ("depth", checkpoint(dense._depth_anything), {"scale": "inverse"}),
    "normal": ("normal", checkpoint(dense._tipsv2), {}),
    "segformer": ("semseg", checkpoint(dense._segformer), {}),
    "mask2former": ("semseg", checkpoint(dense._mask2former), {}),
    "clip": ("clip", checkpoint(dense._clip), {}),
    "dinov2": ("dinov2", features.dinov2, {}),
    "imagebind": ("imagebind", lambda folder: features.imagebind(folder) and None, {}),
}


def load(network: str, folder: Path, **fields: Any) -> Labeler:
    kind, write, options = NETWORKS[network]
    write(folder)
    spec = LabelerSpec(
        kind, (kind,), str(folder), precision="fp32", device="cpu", options=options, **fields
    )
    return load_labeler(spec)


def difference(one: Any, other: Any) -> float:
    one, other = np.asarray(one), np.asarray(other)
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    if one.dtype == np.uint8:
        return float((one != other).mean())
    return float(np.abs(one.astype(np.float64) - other).max())


# --- buckets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_a_label_does_not_depend_on_what_shapes_are_in_its_batch(tmp_path, images, network):
    labeler = load(network, tmp_path, batch_size=4)
    (together,) = labeler.label(images).values()
    for number, image in enumerate(images):
        (alone,) = labeler.label([image])[labeler.spec.outputs[0]]
        assert difference(together[number], alone) < 2e-3


@pytest.mark.parametrize("write", [detection.rt_detr, detection.detr, detection.yolos])
def test_boxes_do_not_depend_on_what_shapes_are_in_their_batch(tmp_path, images, write):
    write(tmp_path)
    spec = detection.spec(tmp_path, threshold=0, max_overlap=1.0)
    labeler = load_labeler(dataclasses.replace(spec, precision="fp32"))
    together = labeler.label(images)["det"]
    for number, image in enumerate(images):
        (alone,) = labeler.label([image])["det"]
        found = [each["box"] for each in together[number]["instances"]]
        expected = [each["box"] for each in alone["instances"]]
        np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("write", [captions.blip, captions.git])
def test_pictures_of_any_size_have_their_captions_in_one_pass(tmp_path, images, write):
    write(tmp_path)
    spec = dataclasses.replace(captions.spec(tmp_path, max_new_tokens=4), batch_size=len(images))
    labeler = load_labeler(dataclasses.replace(spec, precision="fp32"))
    passes = counted(labeler)
    together = labeler.label(images)["caption"]
    assert passes == [len(images)]
    assert together == [labeler.label([image])["caption"][0] for image in images]


def counted(labeler: Labeler) -> list[int]:
    """Number of items of each call of `predict`."""
    sizes, predict = [], labeler.predict

    def counting(items: Any) -> Any:
        sizes.append(len(items))
        return predict(items)

    labeler.predict = counting  # type: ignore[method-assign]
    return sizes


@pytest.mark.parametrize("network", ["segformer", "mask2former", "clip", "dinov2", "imagebind"])
def test_a_network_that_sees_squares_fills_its_batches_whatever_the_sizes(
    tmp_path, images, network
):
    labeler = load(network, tmp_path, batch_size=4)
    passes = counted(labeler)
    labeler.label(images)
    assert passes == [4, 4, 1]


def test_a_network_that_keeps_the_aspect_has_one_batch_for_sizes_that_it_sees_alike(tmp_path):
    labeler = load("depth_anything", tmp_path, batch_size=4)
    alike = [(60, 90), (61, 91), (62, 93), (64, 96), (70, 105), (80, 120), (90, 134), (100, 151)]
    assert {labeler.seen(*size) for size in alike} == {(1, 3, 56, 84)}
    assert labeler.seen(90, 60) == (1, 3, 84, 56)
    passes = counted(labeler)
    values = labeler.label([np.zeros((*size, 3), np.uint8) for size in alike])["depth"]
    assert passes == [4, 4]
    assert [value.shape for value in values] == alike


def test_a_set_of_mixed_aspect_ratios_fills_its_batches():
    """Of Depth Anything, with what pictures of the web look like: usual formats, cut by a few
    pixels, and a quarter of any format."""
    rng = np.random.default_rng(0)
    usual = rng.choice([1, 4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3], 1000)
    ratios = np.where(rng.random(1000) < 0.75, usual, np.exp(rng.uniform(-0.7, 0.8, 1000)))
    ratios *= np.exp(rng.normal(0, 0.006, 1000))
    sizes = [(256, round(256 * r)) if r >= 1 else (round(256 / r), 256) for r in ratios]
    processor = hf.DPTImageProcessor(
        size={"height": 518, "width": 518}, keep_aspect_ratio=True, ensure_multiple_of=14
    )
    spec = LabelerSpec("depth", ("depth",), "none", device="cpu")
    inputs = Inputs(SimpleNamespace(device=torch.device("cpu"), spec=spec), processor)
    buckets: Buckets[tuple[int, int]] = Buckets(size=8, most=MOST_PIXELS)
    full = sum(len(batch) == 8 for size in sizes
               for batch in buckets.add(size, kind=inputs.shape(*size), cost=size[0] * size[1]))
    assert 8 * full >= 0.8 * len(sizes)
    assert len(buckets.rest()) < 50


@pytest.mark.parametrize("network", NETWORKS)
def test_the_shape_that_is_foretold_is_the_one_that_the_network_gets(tmp_path, images, network):
    labeler = load(network, tmp_path, batch_size=4)
    module = getattr(labeler, "tower", labeler).model
    got: list[tuple[int, ...]] = []
    module.register_forward_pre_hook(
        lambda _, args, more: got.append(tuple([*args, more.get("pixel_values")][0].shape[1:])),
        with_kwargs=True,
    )
    foretold = set()
    for image in images:
        labeler.label([image])
        seen = labeler.seen(*image.shape[:2])
        foretold.add(tuple(seen)[1:] if isinstance(seen, tuple) else (3, seen, seen))
    assert foretold == set(got)


def test_of_a_processor_that_cannot_tell_pictures_of_one_size_meet(tmp_path, monkeypatch):
    labeler = load("depth_anything", tmp_path)

    def refuse(**_: Any) -> None:
        raise NotImplementedError("no meta device")

    monkeypatch.setattr(labeler.inputs, "_images", refuse)
    labeler.inputs.shape.cache_clear()
    assert labeler.seen(40, 60) == (40, 60)


# --- pictures at the edge ---------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_label_pictures_of_one_pixel_grey_alpha_and_cmyk(tmp_path, network):
    modes = [("RGB", (1, 1), "PNG"), ("L", (3, 2), "PNG"), ("LA", (9, 8), "PNG"),
             ("RGBA", (8, 9), "PNG"), ("CMYK", (16, 8), "JPEG")]  # fmt: skip
    images = [stored(*each) for each in modes]
    labeler = load(network, tmp_path, batch_size=2)
    ((name, values),) = labeler.label(images).items()
    modality = modalities.get(name)
    for image, value in zip(images, values, strict=True):
        assert np.isfinite(np.asarray(value, np.float32)).all()
        assert modality.decode(modality.encode(value)).shape == value.shape
        if modality.kind == "map":
            assert value.shape[:2] == image.shape[:2]


@pytest.mark.parametrize("network", ["depth_anything", "segformer", "clip"])
def test_networks_label_20_megapixels_at_their_own_size(tmp_path, network):
    image = np.zeros((4000, 5000, 3), np.uint8)
    image[:, 2500:] = 255
    (value,) = load(network, tmp_path).label([image]).values()
    expected = (4000, 5000) if network != "clip" else (4, 4, 16)
    assert value[0].shape == expected


def test_what_sam_says_of_the_empty_part_of_its_square_is_not_looked_at(tmp_path, monkeypatch):
    instances.write_sam(tmp_path)
    labeler = instances.load("sam", tmp_path, *instances.SAM, points_per_side=2)
    known = instances.KnownMasks(
        (slice(2, 6), slice(2, 6)), (slice(2, 6), slice(9, 15)), (slice(8, 16), slice(0, 16)),
        scores=(0.97, 0.96, 0.95),
    )  # fmt: skip
    # Two masks hang on the threshold, but only in the lower half, which a wide picture leaves.
    known.logits[:, 8:] = torch.maximum(known.logits[:, 8:], torch.tensor(-0.5))
    monkeypatch.setattr(labeler.network, "model", known)
    for size, scores in (((40, 80), [0.97, 0.96]), ((80, 80), [0.95])):
        (value,) = labeler.label([np.zeros((*size, 3), np.uint8)])["sam_instance"]
        assert [round(each["score"], 2) for each in value["instances"]] == scores
