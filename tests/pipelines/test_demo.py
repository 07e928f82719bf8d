"""The whole chain at its smallest scale: done once, found done, and finished after being killed."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from infra.store import Store
from infra.verify import verify

# Two minutes on two idle cores; many more beside other work.
pytestmark = pytest.mark.timeout(1800)

ROOT = Path(__file__).resolve().parents[2]
MODALITIES = {
    "rgb", "depth", "normal", "semseg", "det", "caption", "clip", "dinov2", "dinov2_global",
    "canny_edge", "color_palette", "metadata",
}  # fmt: skip
TASKS = {*(f"rgb->{name}" for name in MODALITIES - {"rgb"}), "caption->rgb", "det->rgb"}
ROWS = {"metric", "lower_is_better", "constant", "teacher", "tokenizer_bound", "fourm", "fourm_10",
        "gap_recovered"}  # fmt: skip


def _command(root: Path) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", "demo", "--scale", "tiny", "--root", str(root)]


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def _demo(root: Path) -> str:
    done = subprocess.run(
        _command(root), cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=1700
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished tiny demo: its dataset, and what it said."""
    root = tmp_path_factory.mktemp("demo") / "data"
    return root, _demo(root)


def test_the_demo_measures_every_task(demo: tuple[Path, str]) -> None:
    root, said = demo
    assert "Watch it at http://127.0.0.1:" in said
    results = json.loads((root / "results.json").read_text())
    assert results.keys() >= {"commit", "date", "machine", "samples", "seconds", "tasks"}
    assert results["seconds"].keys() >= {"fetch", "label", "tokenize", "train", "total"}
    assert results["tasks"].keys() == TASKS
    for task in results["tasks"].values():
        assert task.keys() >= ROWS
        assert None not in (task["constant"], task["teacher"], task["fourm"])
    assert results["matrix"].keys() == {"nothing", *MODALITIES}
    page = (root / "report.html").read_text()
    assert "data:image/" in page
    assert "src=\"http" not in page


def test_the_demo_searches_by_predicted_vectors_and_walks_a_chain(demo: tuple[Path, str]) -> None:
    results = json.loads((demo[0] / "results.json").read_text())
    (name, found), = results["retrieval"].items()
    assert name == "dinov2_global"
    assert found["from"].keys() == MODALITIES - {"dinov2", "dinov2_global"}
    assert found["tokenizer_bound"].keys() == {"recall@1", "recall@5"}
    steps = results["chain"]["steps"]
    assert len(steps) >= 6
    assert set(steps) <= MODALITIES
    assert results["chain"]["scores"].keys() == set(steps[1:])
    shown = {path.stem for path in (demo[0] / "reports").rglob("*.png")}
    assert {"overview", "chain", "search-dinov2_global"} <= shown
    assert shown >= {f"rgb-to-{name}" for name in MODALITIES - {"rgb", "caption"}}


def test_the_run_of_the_chain_shows_what_its_stages_did_and_the_scores(
    demo: tuple[Path, str],
) -> None:
    with closing(sqlite3.connect(demo[0].parent / "prefect" / "prefect.db")) as database:
        found = database.execute(
            "select artifact.key, artifact.data from artifact"
            " join flow_run on artifact.flow_run_id = flow_run.id"
            " join flow on flow_run.flow_id = flow.id where flow.name = 'end-to-end'"
        ).fetchall()
    shown = {key.split("-")[0]: json.loads(json.loads(data)) for key, data in found}
    assert any(row["stage"].startswith("label:depth") for row in shown["chain"])
    assert {"rgb \u2192 depth", "caption \u2192 rgb"} <= {row["task"] for row in shown["results"]}


def test_everything_in_the_dataset_verifies(demo: tuple[Path, str]) -> None:
    assert verify(Store(str(demo[0])), deep=True).problems == []


def test_a_second_demo_does_nothing_and_says_so(demo: tuple[Path, str]) -> None:
    began = time.monotonic()
    assert "0 shards, 0 steps, 0 evaluations to do" in _demo(demo[0])
    assert time.monotonic() - began < 60


def test_another_scale_in_the_same_place_is_refused(demo: tuple[Path, str]) -> None:
    command = [*_command(demo[0])[:-4], "--scale", "long", "--root", str(demo[0])]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert "choose another --root" in " ".join(done.stderr.split())


def test_generate_writes_pictures_and_text(demo: tuple[Path, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "generate", "--root", str(demo[0])]
    command += ["--from", "caption=a red cube", "--to", "depth,det", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "depth.png").exists()
    assert (tmp_path / "det.json").exists()


@pytest.mark.chaos
@pytest.mark.timeout(3000)
def test_a_demo_that_is_killed_again_and_again_completes(tmp_path: Path) -> None:
    root = tmp_path / "data"
    before = set(psutil.pids())
    landmarks = ("commits", "commits/label:semseg*", "tokenizers", "manifests/main", "runs/main*")
    for landmark in landmarks:
        process = subprocess.Popen(
            _command(root), cwd=ROOT, env=_environment(), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None and not list(root.glob(landmark)):
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "Results:" in _demo(root)
    assert verify(Store(str(root)), deep=True).problems == []
    assert _leftovers(before) == []


def _leftovers(before: set[int]) -> list[str]:
    """Command lines of our processes that outlived the demo; Ray's daemons need up to a minute."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        alive = []
        for process in psutil.process_iter(["pid", "cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            ours = "scenes.server" in line or "pipelines/attached" in line
            if ours and process.info["pid"] not in before:
                alive.append(line)
        if not alive:
            return []
        time.sleep(1)
    return alive


def test_a_demo_that_finished_before_an_option_came_is_still_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.demo import FINISHED, SIZES, World, demo_params, finished_as, is_finished

    root = tmp_path / "data"
    world = World.at(root, SIZES["tiny"].scenes)
    chosen = demo_params(SIZES["tiny"], str(root), world)
    record = finished_as(chosen)
    for option in ("data", "start", "freeze", "lora"):
        del record["params"]["train"][option]
    store = Store(str(root))
    store.write_json(FINISHED, record)
    monkeypatch.setattr("tasks.publish.is_current", lambda store, name: True)
    assert is_finished(chosen)
    assert not is_finished(chosen.model_copy(update={
        "train": chosen.train.model_copy(update={"seed": 1})}))
    store.write_json(FINISHED, {**record, "params": {"no": "form"}})
    assert not is_finished(chosen)
