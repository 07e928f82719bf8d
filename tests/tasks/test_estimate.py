"""What a dataset will take: measured where there are commits, said to be assumed where not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infra.ledger import Ledger, ShardData, Stage
from infra.shards import sample_key, write_tar
from infra.store import Store
from models import modalities
from models.labelers import KINDS
from tasks.estimate import Rate, assumed, estimate, rates, total

FETCH = Stage("fetch", 1, {}, ("rgb",))
STAGES = ["fetch", "label:depth", "tokens:depth"]


def commit(store: Store, kept: int, lost: int, seconds: float, **told: Any) -> int:
    keys = [sample_key(0, row) for row in range(kept + lost)]
    statuses = [(key, "ok" if row < kept else "dns", "") for row, key in enumerate(keys)]
    tar = write_tar((f"{key}.jpg", b"x" * 1000) for key in keys[:kept])
    data = ShardData(keys[:kept], {"rgb": tar}, statuses, seconds, **told)
    commit = Ledger(store).commit(FETCH, 0, data)
    return commit.outputs["rgb"]["bytes"] + commit.status["bytes"]


def test_rates_are_those_of_the_commits(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    stored = commit(store, kept=30, lost=20, seconds=5.0)
    assert rates(store) == {"fetch": Rate(10.0, stored / 50, 0.6, "measured")}


def test_shards_that_overlap_in_a_worker_are_one_workers_time(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    commit(store, kept=30, lost=20, seconds=20.0, queues={"shards": 4.0})
    assert rates(store)["fetch"].per_second == 10.0


def test_hours_follow_from_rows_left_rates_and_workers() -> None:
    measured = {
        "fetch": Rate(10, 100, 0.5, "measured"),
        "label:depth": Rate(5, 10, 1.0, "measured"),
    }
    lines = estimate(
        STAGES, rows=72_000, shards=8, done={"fetch": 4}, measured=measured, workers=2, gpus=0.5
    )
    fetch, label, tokens = lines
    assert (fetch.shards, fetch.samples, fetch.bytes) == (4, 36_000, 3_600_000)
    assert fetch.hours == pytest.approx(36_000 / 10 / 2 / 3600)
    assert fetch.gpu_hours == 0
    assert (label.shards, label.samples) == (8, 36_000)
    assert label.hours == pytest.approx(36_000 / 5 / 2 / 3600)
    assert label.gpu_hours == pytest.approx(label.hours)
    assert [line.basis for line in lines] == ["measured", "measured", "assumed"]
    assert total(lines)["hours"] == pytest.approx(fetch.hours + label.hours + tokens.hours)


def test_a_gpu_is_assumed_to_be_faster_and_every_stage_has_a_rate() -> None:
    for stage in (*STAGES, "label:mine", "distinct", "tokens:caption"):
        assert assumed(stage, gpu=True).per_second >= assumed(stage, gpu=False).per_second > 0


def test_what_is_done_takes_nothing() -> None:
    done = dict.fromkeys(STAGES, 8)
    lines = estimate(STAGES, rows=100, shards=8, done=done, measured={}, workers=1)
    assert total(lines) == {"bytes": 0, "hours": 0, "gpu_hours": 0}


def test_texts_are_counted_as_texts_and_what_holds_codes_as_work_of_a_network() -> None:
    network = assumed("tokens:depth", gpu=False)
    for name in modalities.names():
        form = modalities.text_form(name)
        rate = assumed(f"tokens:{name}", gpu=False)
        if form is not None and form.parts is None:
            assert rate.per_second > network.per_second
            assert rate.bytes < network.bytes
        else:
            assert rate == network


def test_labels_are_counted_by_what_their_labeler_is_and_writes() -> None:
    rate = {name: assumed(f"label:{name}", gpu=False) for name in KINDS}
    assert min(rate[name].per_second for name in ("canny_edge", "color_palette", "metadata")) > max(
        rate[name].per_second for name in ("sam", "dinov2", "human_poses", "t5_caption")
    )
    assert rate["metadata"].bytes < rate["t5_caption"].bytes
    assert rate["dinov2"].bytes > assumed("label:clip", gpu=False).bytes
    assert assumed("label:mine", gpu=True).per_second > assumed("label:mine", gpu=False).per_second
