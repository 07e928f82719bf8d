"""Metadata tell the size in which a picture came, not the one in which it is stored."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from infra.ledger import Ledger, ShardData
from infra.shards import read_tar, write_tar
from infra.store import Store
from models import modalities
from models.labelers import LabelerSpec, load_labeler
from tasks.label import label_stage
from tasks.label_work import LabelWork
from tests.tasks.test_label import FETCH, jpeg

SPEC = LabelerSpec("metadata", ("metadata",), "computed", device="cpu", precision="fp32")
SIZES = [(640, 480), None, (32, 32)]


def sizes_told(store: Store, columns: dict[str, pa.Array]) -> list[tuple[int, int]]:
    keys = [f"0000000000{number}" for number in range(len(SIZES))]
    outputs = {"rgb": write_tar((f"{key}.jpg", jpeg(90)) for key in keys),
               "caption": write_tar((f"{key}.txt", b"text") for key in keys)}  # fmt: skip
    statuses = [(key, "ok", "") for key in keys] + [("00000000009", "http_404", "")]
    Ledger(store).commit(FETCH, 0, ShardData(keys, outputs, statuses, 1.0, columns=columns))
    stage = label_stage(SPEC, FETCH)
    assert stage.revision == "v2", "labels of the stored size are not mixed with these"
    data = LabelWork(store, stage, load_labeler(SPEC)).run(0)
    decode = modalities.get("metadata").decode
    found = [decode(member) for _, member in read_tar(data.outputs["metadata"])]
    return [(each["original_width"], each["original_height"]) for each in found]


def test_the_size_in_which_a_picture_came_is_told_where_it_is_known(tmp_path) -> None:
    columns = {
        name: pa.array([size and size[axis] for size in [*SIZES, None]], pa.int32())
        for axis, name in enumerate(("width", "height"))
    }
    assert sizes_told(Store(str(tmp_path)), columns) == [(640, 480), (16, 16), (32, 32)]


def test_without_a_record_of_sizes_the_stored_one_is_told(tmp_path) -> None:
    assert sizes_told(Store(str(tmp_path)), {}) == [(16, 16)] * 3


@pytest.mark.parametrize(("stored", "told"), [((30, 40), (4000, 3000)), ((40, 30), (3000, 4000))])
def test_a_picture_that_was_turned_upright_came_on_its_side(stored, told) -> None:
    sample = {"rgb": np.zeros((*stored, 3), np.uint8), "original_size": (3000, 4000)}
    (found,) = load_labeler(SPEC).label_samples([sample])["metadata"]
    assert (found["original_width"], found["original_height"]) == told
