"""A network whose activations overflow leaves holes, and never labels that look like any other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models import modalities
from models.labelers import load_labeler, preset
from models.labelers.base import sure_of
from models.labelers.inputs import InParts


@pytest.mark.parametrize(("name", "shape"), [
    ("depth", (4, 6)), ("normal", (4, 6, 3)), ("clip", (2, 2, 8)), ("dinov2_global", (8,)),
    ("t5_caption", (3, 8)),
])  # fmt: skip
def test_values_that_are_no_numbers_are_not_stored(name: str, shape: tuple[int, ...]) -> None:
    value = np.full(shape, 0.5, np.float32)
    modalities.get(name).encode(value)
    value.ravel()[1] = np.nan
    with pytest.raises(ValueError, match="not a finite number"):
        modalities.get(name).encode(value)


def test_features_beyond_half_precision_are_refused_and_infinite_depths_are_far() -> None:
    with pytest.raises(ValueError, match="not a finite number"):
        modalities.get("clip").encode(np.full((2, 2, 8), 1e6, np.float32))
    far = modalities.get("depth")
    assert (far.decode(far.encode(np.full((2, 2), np.inf, np.float32))) == 1).all()


@pytest.mark.parametrize("kind", ["semseg", "det"])
def test_classes_and_boxes_are_not_made_of_what_is_no_number(kind: str) -> None:
    labeler = load_labeler(preset("scenes")[kind])
    assert isinstance(labeler, InParts)
    images = [np.full((64, 64, 3), level, np.uint8) for level in (0, 200)]
    with labeler.inference():
        outputs = labeler.forward(labeler.prepare(images))
        labeler.finish(outputs, images)
        logits = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
        logits[1].fill_(torch.nan)
        with pytest.raises(ValueError, match="not a number"):
            labeler.finish(outputs, images)


def test_what_a_network_masks_out_by_infinity_is_a_number() -> None:
    sure_of(torch.tensor([-torch.inf, 1.0]), torch.zeros(0))
    with pytest.raises(ValueError, match="not a number"):
        sure_of(torch.zeros(2), torch.tensor([torch.nan]))
