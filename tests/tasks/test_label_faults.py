"""What goes wrong at a picture is a hole of it; what it is not to blame for is none."""

from __future__ import annotations

import struct
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from infra.shards import hole
from infra.store import Store
from infra.units import SystemicFailure
from models.labelers.base import Image, Labeler
from tasks.label import label_stage
from tasks.label_work import LabelWork
from tests.tasks.test_label import FETCH, SPEC, commit_pictures, jpeg

ODD = [
    IndexError("class 91"), KeyError(91), TypeError("odd"), ZeroDivisionError("odd"),
    OverflowError("odd"), struct.error("odd"), AssertionError("odd"), RecursionError("odd"),
]  # fmt: skip
LOST = torch.AcceleratorError("CUDA error: device-side assert triggered")


class Faulty(Labeler):
    """Depth is brightness; white pictures fail, in the network or before it."""

    def __init__(self, error: Exception, part: str = "predict") -> None:
        super().__init__(SPEC)
        self.error, self.part = error, part

    def alike(self, sample: Any) -> Hashable:
        if self.part == "alike" and sample["rgb"].min() == 255:
            raise self.error
        return super().alike(sample)

    def predict(self, images: Sequence[Image]) -> dict[str, list[Any]]:
        if self.part == "predict" and any(image.min() == 255 for image in images):
            raise self.error
        return {"depth": [image[..., 0].astype(np.float32) / 255 for image in images]}


@pytest.fixture
def store(tmp_path) -> Store:
    """Four pictures, the third of them white."""
    store = Store(str(tmp_path))
    levels = (10, 90, 255, 40)
    commit_pictures(store, [(f"0000000000{n}.jpg", jpeg(v)) for n, v in enumerate(levels)])
    return store


def reasons(store: Store, labeler: Labeler) -> list[str]:
    data = LabelWork(store, label_stage(SPEC, FETCH), labeler).run(0)
    return [reason for _, reason, _ in data.statuses]


@pytest.mark.parametrize("part", ["alike", "predict"])
@pytest.mark.parametrize("error", ODD, ids=lambda error: type(error).__name__)
def test_an_error_of_any_kind_at_one_picture_is_a_hole_and_not_the_end_of_its_shard(
    store, error, part
) -> None:
    data = LabelWork(store, label_stage(SPEC, FETCH), Faulty(error, part)).run(0)
    assert [reason for _, reason, _ in data.statuses] == ["ok", "ok", "unlabelled", "ok"]
    assert type(error).__name__ in data.statuses[2][2]


def test_a_lost_gpu_leaves_no_holes_behind(store, monkeypatch) -> None:
    """After it every call fails, so that the rest of the shard would be holes for good."""
    def dead() -> None:
        raise LOST

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    with pytest.raises(torch.AcceleratorError):
        reasons(store, Faulty(LOST))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # a kernel that did not start
    assert reasons(store, Faulty(LOST)) == ["ok", "ok", "unlabelled", "ok"]


@pytest.mark.parametrize("error", [SystemicFailure("no network"), OSError("disk full")])
def test_what_no_picture_is_to_blame_for_fails_the_shard(store, error) -> None:
    with pytest.raises(type(error), match=str(error)):
        reasons(store, Faulty(error))


def test_holes_of_the_fetch_stage_do_not_hide_that_a_labeler_labels_nothing(tmp_path) -> None:
    store = Store(str(tmp_path))
    commit_pictures(store, [("00000000000.jpg", jpeg(255)), hole("00000000001", "gone")])
    with pytest.raises(RuntimeError, match="labelled no picture of shard 0"):
        reasons(store, Faulty(KeyError(91)))
