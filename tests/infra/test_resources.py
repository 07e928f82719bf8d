"""Workers and cores that nobody chose are as many as a cluster's nodes have room for."""

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from infra import ray_session
from infra.ray_session import Embedded, Existing
from infra.runner import Resources
from infra.store import Store
from pipelines import importing, ingest, label, stages
from pipelines.forms import Compute
from pipelines.params import ImportParams, IngestParams, LabelerResources, LabelParams
from pipelines.workers import NO_GPU, gpus_each, resources

HEAD = {"memory": 1e9}
SMALL, LARGE = {"CPU": 4.0}, {"CPU": 16.0}
GPUS = {"CPU": 16.0, "GPU": 4.0, "accelerator_type:A100": 1.0}
LESSER = {"CPU": 8.0, "GPU": 1.0, "accelerator_type:T4": 1.0}
OPEN = Resources(workers=None, threads=0)


def told(found: Resources) -> tuple[int | None, int, float]:
    return found.workers, found.threads, found.num_cpus


@pytest.mark.parametrize(
    ("asked", "nodes", "expected"),
    [
        (OPEN, [HEAD, SMALL, LARGE], (20, 1, 1)),
        (Resources(workers=2, threads=0), [HEAD, SMALL, LARGE], (2, 8, 8)),
        (Resources(workers=3, threads=0), [SMALL, SMALL, LARGE], (3, 5, 5)),
        (Resources(workers=99, threads=0), [SMALL, LARGE], (99, 1, 1)),
        (Resources(workers=None, num_gpus=1, threads=0), [LARGE, GPUS, LESSER], (5, 4, 4)),
        (Resources(workers=None, num_gpus=0.5, threads=0), [GPUS], (8, 2, 2)),
        (Resources(workers=None, num_gpus=0.125, threads=0), [GPUS], (16, 1, 1)),
        (Resources(workers=None, num_gpus=1, threads=0, accelerator="T4"), [GPUS, LESSER],
         (1, 8, 8)),
        (Resources(workers=None, num_gpus=1, threads=0), [HEAD], (1, 1, 1)),
        (Resources(workers=None, num_cpus=2, threads=2), [SMALL, LARGE], (10, 2, 2)),
        (Resources(workers=3, num_cpus=2, threads=2), [SMALL], (3, 2, 2)),
    ],
)  # fmt: skip
def test_what_is_left_open_is_filled_in_as_nodes_have_room(asked, nodes, expected) -> None:
    assert told(asked.on(nodes)) == expected


def test_a_worker_never_takes_more_cores_than_a_node_that_it_fits_on_has() -> None:
    for workers in range(1, 40):
        found = Resources(workers=workers, threads=0).on([HEAD, SMALL, LARGE])
        assert found.room([SMALL, LARGE]) >= workers or found.threads == 1


def test_this_machine_is_known_and_a_cluster_is_asked_by_the_run() -> None:
    here = LabelParams(ray=Embedded(num_cpus=6, num_gpus=2))
    assert told(resources(here)) == (2, 3, 3)
    assert told(resources(here, LabelerResources(gpus=0))) == (6, 1, 1)
    assert told(resources(here, LabelerResources(gpus=0.5))) == (4, 1, 1)
    there = LabelParams(ray=Existing(), gpus=1)
    assert (resources(there).workers, resources(there).threads) == (None, 0)
    assert resources(there, LabelerResources(workers=3)).workers == 3
    assert resources(LabelParams(ray=Existing(), workers=0)).threads >= 1


@pytest.mark.parametrize(
    ("form", "gpus", "expected"),
    [
        ({}, 1, (1, 8, 1)),
        ({}, 4, (4, 2, 1)),
        ({"workers": 4}, 1, (4, 2, 0.25)),
        ({"workers": 2}, 4, (2, 4, 1)),
        ({"gpus": 0}, 1, (8, 1, 0)),
        ({"gpus": 0.5}, 1, (2, 4, 0.5)),
        ({"device": "cpu"}, 1, (8, 1, 0)),
        ({"workers": 0}, 1, (0, 8, 0)),
        ({}, 0, (8, 1, 0)),
    ],
)
def test_gpus_of_this_machine_are_used_without_being_asked_for(
    monkeypatch: pytest.MonkeyPatch, form: dict, gpus: int, expected: tuple
) -> None:
    monkeypatch.setattr(ray_session, "gpus", lambda: gpus)
    found = resources(LabelParams(ray=Embedded(num_cpus=8), **form))
    assert (found.workers, found.threads, found.num_gpus) == expected


def test_gpus_of_a_cluster_are_for_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_session, "gpus", lambda: 1)
    assert resources(LabelParams(ray=Existing())).num_gpus == 0
    assert resources(LabelParams(ray=Existing(), gpus=1)).num_gpus == 1


def test_who_did_not_ask_for_gpus_of_a_cluster_is_told_that_nobody_uses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stages, "run_stages", lambda *_, **__: {})
    caplog.set_level("INFO")

    def told(own: LabelerResources | None = None, **form: Any) -> bool:
        caplog.clear()
        stages.run_jobs(Store(str(tmp_path)), [], LabelParams(**form), "label", own=own)
        return "gpus=1 gives each worker a GPU" in caplog.text

    assert told(ray=Existing())
    assert not told(ray=Existing(), gpus=0)
    assert not told(ray=Existing(), gpus=1)
    assert not told(ray=Existing(), own=NO_GPU)
    assert not told(ray=Embedded())


def test_what_is_computed_without_a_network_keeps_no_gpu_from_those_with_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_session, "gpus", lambda: 1)
    labels = [SimpleNamespace(stage=SimpleNamespace(name=f"label:{name}"))
              for name in ("depth", "canny_edge", "clip", "color_palette")]  # fmt: skip
    computed = ["canny_edge", "color_palette"]

    def occupied(**form: Any) -> list[tuple[float, list[str]]]:
        params = LabelParams(**form)
        return [(gpus_each(params, own), [job.stage.name for job in jobs])
                for own, jobs in label._alike(labels, params, computed)]  # fmt: skip

    every = [job.stage.name for job in labels]
    assert occupied() == [(1, every[::2]), (0, every[1::2])]
    assert occupied(gpus=0) == [(0, every)]
    told = {"canny_edge": {"gpus": 0.5}}
    assert (0.5, ["label:canny_edge"]) in occupied(resources=told)


@pytest.mark.parametrize("steps", [ingest, importing])
def test_downloads_and_copies_keep_no_gpu_from_those_who_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: ModuleType
) -> None:
    asked: list[Resources] = []

    def run(store: object, jobs: list, form: Compute, *_: object, own: LabelerResources) -> list:
        asked.append(resources(form, own))
        return []

    class Dataset:
        """Just enough of one."""

        plan = fetch_config = download = None
        ledger = SimpleNamespace(each_commit=lambda _: ())
        duplicates = "drop_exact"

        def __init__(self, store: object) -> None:
            self.check = lambda *_: None

    monkeypatch.setattr(steps, "run_jobs", run)
    ray = Embedded(num_cpus=8, num_gpus=1)
    if steps is importing:
        monkeypatch.setattr(steps, "import_jobs", lambda *_: [])
        monkeypatch.setattr(steps, "finish_import", lambda *_: None)
        form = ImportParams(root=str(tmp_path), source="set", ray=ray, gpus=1)
        steps.import_shards.fn(form)
    else:
        marks = pa.table({"kind": pa.array([], pa.string())})
        monkeypatch.setattr(steps.chain, "Chain", Dataset)
        monkeypatch.setattr(steps.fetch, "fetch_job", lambda *_: None)
        monkeypatch.setattr(steps.duplicates, "mark_duplicates", lambda *_: ("", marks))
        monkeypatch.setattr(steps.duplicates, "distinct_job", lambda *_: None)
        form = IngestParams(root=str(tmp_path), source="list.tsv", ray=ray, gpus=1)
        steps.fetch_rows.fn(form)
        steps.find_repeated.fn(form)
    assert asked
    assert all((each.workers, each.num_gpus) == (8, 0) for each in asked)


@pytest.mark.parametrize(("target", "have", "sentence"), [
    (Embedded(), 0, "torch finds none on this machine: lower gpus, or leave it out, or choose a"),
    (Embedded(), 0.5, "torch finds 0.5 on this machine"),
    (Embedded(num_gpus=0), 0, "Ray has 0: lower gpus, or leave it out, or raise num_gpus in the"),
])  # fmt: skip
def test_too_few_gpus_are_refused_with_what_there_is_and_what_to_do(target, have, sentence) -> None:
    said = str(target.too_small("a worker", 1, "GPU", have))
    assert said.startswith(f"a worker occupies 1 GPU and {sentence}")


def test_nothing_is_left_open_where_there_are_no_nodes_to_ask() -> None:
    with pytest.raises(ValueError, match="without Ray's nodes"):
        Resources(workers=0, threads=0)
