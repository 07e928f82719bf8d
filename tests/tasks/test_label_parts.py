"""A labeler in parts: the outer ones run beside its network, and what fails in one of them is done
again in one piece, to the same labels."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from infra.ledger import Ledger, ShardData, Stage
from infra.shards import write_tar
from infra.store import Store
from models import modalities
from models.labelers import LabelerSpec
from models.labelers.base import Image
from models.labelers.inputs import InParts
from tasks.label import label_stage
from tasks.label_work import LabelWork

FETCH = Stage("fetch", 1, {}, ("rgb",))
SPEC = LabelerSpec("depth", ("depth",), "org/model", revision="1", batch_size=4, device="cpu")
PARTS = ("prepare", "forward", "finish")


class Brightness(InParts):
    """Depth is brightness. Tells of each call its part, the thread and the number of pictures."""

    fits = 100

    def __init__(self, spec: LabelerSpec = SPEC) -> None:
        super().__init__(spec)
        self.calls: list[tuple[str, int, int]] = []

    def seen(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def told(self, part: str, number: int) -> None:
        assert torch.is_inference_mode_enabled()
        self.calls.append((part, threading.get_ident(), number))

    def prepare(self, images: Sequence[Image]) -> torch.Tensor:
        self.told("prepare", len(images))
        return torch.from_numpy(np.stack(images))[..., 0].float()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.told("forward", len(inputs))
        if len(inputs) > self.fits:
            raise torch.OutOfMemoryError("no memory")
        if inputs.max() > 250:
            raise RuntimeError("too white")
        return inputs / 255

    def finish(self, outputs: torch.Tensor, images: Sequence[Image]) -> dict[str, list[Any]]:
        self.told("finish", len(images))
        return {"depth": list(outputs.numpy())}


@pytest.fixture
def store(tmp_path) -> Store:
    """A shard of eleven pictures of two sizes, one of them white."""
    rng, encode = np.random.default_rng(0), modalities.get("rgb").encode
    pictures = [rng.integers(0, 200, (16 + 8 * (n % 3 == 1), 16, 3), np.uint8) for n in range(11)]
    pictures[5][:] = 255
    keys = [f"{number:011d}" for number in range(len(pictures))]
    tar = write_tar((f"{key}.jpg", encode(each)) for key, each in zip(keys, pictures, strict=True))
    data = ShardData(keys, {"rgb": tar}, [(key, "ok", "") for key in keys], 1.0)
    store = Store(str(tmp_path))
    Ledger(store).commit(FETCH, 0, data)
    return store


def labelled(store: Store, labeler: InParts) -> tuple[dict[str, bytes], list[tuple[str, str]]]:
    data = LabelWork(store, label_stage(SPEC, FETCH), labeler).run(0)
    return data.outputs, [(key, reason) for key, reason, _ in data.statuses]


class Whole(Brightness):
    def predict(self, images: Sequence[Image]) -> dict[str, list[Any]]:
        return super().predict(images)


def test_what_goes_before_and_after_a_network_runs_in_other_threads(store):
    labeler = Brightness()
    outputs, statuses = labelled(store, labeler)
    assert [reason for _, reason in statuses] == [
        "unlabelled" if number == 5 else "ok" for number in range(11)
    ]
    threads = {part: {t for p, t, _ in labeler.calls if p == part} for part in PARTS}
    assert len(threads["forward"]) == 1
    assert not threads["finish"] <= threads["forward"]
    assert not threads["prepare"] <= threads["forward"] | threads["finish"]
    whole = Whole()
    assert labelled(store, whole) == (outputs, statuses)
    assert len({thread for _, thread, _ in whole.calls}) == 1


def test_a_subclass_that_predicts_in_another_way_is_obeyed(store):
    class Darkness(Brightness):
        def predict(self, images: Sequence[Image]) -> dict[str, list[Any]]:
            return {"depth": [np.zeros(image.shape[:2], np.float32) for image in images]}

    labeler = Darkness()
    outputs, statuses = labelled(store, labeler)
    assert labeler.calls == []
    assert {reason for _, reason in statuses} == {"ok"}
    assert outputs != labelled(store, Brightness())[0]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "error", [RuntimeError("odd"), ValueError("odd"), torch.OutOfMemoryError("full"), MemoryError()]
)
def test_a_part_that_fails_is_done_again_in_one_piece_to_the_same_labels(store, part, error):
    failed = []

    class Failing(Brightness):
        def told(self, name: str, number: int) -> None:
            super().told(name, number)
            if name == part and number == SPEC.batch_size and not failed:
                failed.append(number)
                raise error

    assert labelled(store, Failing()) == labelled(store, Brightness())
    assert len(failed) == 1


def test_what_found_no_memory_is_halved_and_later_batches_are_prepared_that_small(store):
    labeler = Brightness()
    labeler.fits = 2
    assert labelled(store, labeler) == labelled(store, Brightness())
    assert labeler.fitting == 2
    labeler.calls.clear()
    labelled(store, labeler)
    assert {number for _, _, number in labeler.calls} <= {1, 2}
    labeler.fits = 0
    with pytest.raises(MemoryError, match="no memory"):
        labelled(store, labeler)


def test_a_network_elsewhere_has_all_parts_in_its_own_thread():
    labeler = Brightness()
    assert labeler.apart
    labeler.device = torch.device("cuda")
    assert not labeler.apart


def test_parts_see_full_batches_where_the_network_is_compiled(store, monkeypatch):
    monkeypatch.setattr(Brightness, "compiles", True)
    monkeypatch.setattr("models.labelers.base.check_compiler", lambda device: None)
    labeler = Brightness(dataclasses.replace(SPEC, compile=True))
    assert labelled(store, labeler) == labelled(store, Brightness())
    assert {number for _, _, number in labeler.calls} == {SPEC.batch_size}
