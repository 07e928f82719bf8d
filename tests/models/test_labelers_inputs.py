"""Pictures on their way into a network: all of one size at once, and not a bit otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, CLIPImageProcessor

from models.labelers import load_labeler, preset
from models.labelers.inputs import Inputs


@pytest.mark.parametrize("kind", ["depth", "normal", "semseg", "det", "clip", "dinov2"])
def test_batches_are_what_the_processor_makes_of_each_picture_alone(kind):
    rng = np.random.default_rng(0)
    labeler = load_labeler(preset("scenes")[kind])
    processor = AutoImageProcessor.from_pretrained(labeler.spec.source)
    pictures = [rng.integers(0, 256, (96, 160, 3), dtype=np.uint8) for _ in range(3)]
    alone = [processor(images=[each], return_tensors="pt")["pixel_values"] for each in pictures]
    inputs = Inputs(labeler, AutoImageProcessor.from_pretrained(labeler.spec.source))
    assert (inputs.squeeze is None) == (kind == "depth")  # which keeps the aspect
    assert torch.equal(inputs(pictures)["pixel_values"], torch.cat(alone))


def test_pictures_of_several_sizes_keep_their_order_when_they_are_squeezed():
    rng = np.random.default_rng(1)
    labeler = load_labeler(preset("scenes")["clip"])
    pictures = [rng.integers(0, 256, (side, 90, 3), dtype=np.uint8) for side in (64, 80, 64)]
    size = {"size": {"height": 32, "width": 48}, "do_center_crop": False}
    alone = [CLIPImageProcessor(**size)(images=[each], return_tensors="pt")["pixel_values"]
             for each in pictures]
    inputs = Inputs(labeler, CLIPImageProcessor(), **size)
    assert torch.equal(inputs(pictures)["pixel_values"], torch.cat(alone))


@pytest.mark.parametrize(
    ("fixed", "plain"),
    [
        ({"size": {"height": 32, "width": 48}, "do_center_crop": False}, True),
        ({"size": {"height": 32, "width": 48}, "do_center_crop": False, "do_normalize": False},
         True),
        ({"size": {"height": 32, "width": 32}, "crop_size": {"height": 24, "width": 24}}, False),
        ({"size": {"shortest_edge": 32}}, False),
        ({"do_resize": False, "do_center_crop": False}, False),
    ],
)  # fmt: skip
def test_only_a_processor_that_does_nothing_else_is_cut_short(fixed, plain):
    rng = np.random.default_rng(2)
    labeler = load_labeler(preset("scenes")["clip"])
    inputs = Inputs(labeler, CLIPImageProcessor(), **fixed)
    assert (inputs.squeeze is not None) == plain
    pictures = [rng.integers(0, 256, (64, 90, 3), dtype=np.uint8) for _ in range(2)]
    alone = [CLIPImageProcessor(**fixed)(images=[each], return_tensors="pt")["pixel_values"]
             for each in pictures]
    assert torch.equal(inputs(pictures)["pixel_values"], torch.cat(alone))
