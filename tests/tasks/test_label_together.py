"""Labelers that share a pass over the pictures write what each writes by itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from infra.ledger import Ledger
from infra.ray_session import Embedded
from infra.runner import Resources, run_stages
from infra.shards import hole
from infra.store import Store
from infra.units import StageJob
from models import modalities
from tasks.label import label_jobs
from tests.tasks.test_label import FETCH, commit_pictures, computed, spec

SHARED = [computed("color_palette"), dataclasses.replace(computed("canny_edge"), batch_size=3)]


def label_all(store: Store, jobs: list[StageJob]) -> dict[str, Any]:
    run_stages(store, jobs, target=Embedded(), resources=Resources(workers=0))
    commits = [Ledger(store).read_commit(job.stage, 0) for job in jobs]
    return {name: each["sha256"] for c in commits for name, each in c.outputs.items()}


def some_pictures(store: Store) -> None:
    rng = np.random.default_rng(0)
    encode = modalities.get("rgb").encode
    pictures = [encode(rng.integers(0, 255, (24, 24, 3), np.uint8)) for _ in range(13)]
    members = [(f"{number:011d}.jpg", data) for number, data in enumerate(pictures)]
    commit_pictures(store, [*members, hole("00000000013", "gone"), ("00000000014.jpg", b"broken")])


def test_labelers_in_one_pass_decode_once_and_write_the_bytes_of_separate_ones(
    tmp_path, monkeypatch
):
    apart, together = Store(str(tmp_path / "apart")), Store(str(tmp_path / "together"))
    for store in (apart, together):
        some_pictures(store)
    expected = label_all(apart, label_jobs(SHARED, FETCH, [0]))
    rgb, decoded = modalities.get("rgb"), []
    counted = dataclasses.replace(rgb, decode=lambda data: decoded.append(1) or rgb.decode(data))
    known = modalities.get
    monkeypatch.setattr(modalities, "get", lambda name: counted if name == "rgb" else known(name))
    jobs = label_jobs(SHARED, FETCH, [0], share=[("color_palette", "canny_edge")])
    assert label_all(together, jobs) == expected
    waited = [Ledger(together).read_commit(job.stage, 0).waited for job in jobs]
    assert waited[0].keys() == {"input", "output"}
    assert waited[0] == waited[1]  # each has its part of the wait, as of the seconds
    assert len(decoded) == 13 + 2  # what is broken is tried for each
    reasons = [set(Ledger(together).statuses(job.stage)["reason"].to_pylist()) for job in jobs]
    assert reasons == [{"ok", "no_picture", "undecodable"}] * 2


def test_a_shared_pass_resumes_separate_ones_and_the_other_way_round(tmp_path):
    store = Store(str(tmp_path))
    some_pictures(store)
    apart = label_jobs(SHARED, FETCH, [0])
    first = label_all(store, apart[:1])
    jobs = label_jobs(SHARED, FETCH, [0], share=[("color_palette", "canny_edge")])
    assert label_all(store, jobs).items() > first.items()
    report = run_stages(store, apart, target=Embedded(), resources=Resources(workers=0))
    assert [(each.done, each.skipped) for each in report.values()] == [(0, 1), (0, 1)]


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ([("det", "taste")], r"share='det\+taste': no labeler 'taste'; there are det"),
        ([("det", "semseg"), ("semseg", "det")], r"share='semseg\+det': 'semseg' is in two"),
        ([("det",), ("semseg",)], r"share='det' is one labeler; join two or more by \+"),
        ([("det", "det")], "'det' is in two groups or twice in one"),
        ([("det", "human_poses")], "'human_poses' looks at labels that come first"),
    ],
)
def test_labelers_that_cannot_share_a_pass_are_named(share, message):
    specs = [spec("det"), spec("semseg"), spec("human_poses")]
    with pytest.raises(ValueError, match=message):
        label_jobs(specs, FETCH, [0], share=share)
