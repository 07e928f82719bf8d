"""One's own pictures, command by command as README has it, in a folder and in a bucket."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from infra.scenes import DEMO_SEED
from infra.scenes.server import SceneServer
from infra.store import Store
from infra.verify import verify

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PROJECT = Path(__file__).resolve().parents[2]
SCENES = 40


def fourm(*arguments: str) -> str:
    """Runs the command; returns what it printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments],
        cwd=PROJECT, env={**kept, "PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, f"{arguments}: {done.stdout[-1500:]} {done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_every_command_of_the_readme_leads_from_links_to_generated_pictures(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bucket = request.getfixturevalue("s3_url") if kind == "s3" else ""
    root = f"{bucket}/own" if bucket else str(tmp_path / "mine")
    links = tmp_path / "my-list.tsv"
    with SceneServer(DEMO_SEED, SCENES, 128) as server:
        server.write_tsv(links)
        fourm("ingest", "--root", root, "--source", str(links), "--limit", "10000",
              "--shard-rows", "20", "--image-size", "128",
              "--allow-hosts", f"127.0.0.1:{server.port}")  # fmt: skip
    fourm("label", "--root", root, "--preset", "scenes")
    fourm("train-tokenizers", "--root", root, "--size", "128", "--steps", "4")
    fourm("tokenize", "--root", root, "--crops", "2")
    fourm("publish", "--root", root, "--val-share", "0.3")
    fourm("train", "--root", root, "--recipe", "demo", "--steps", "4", "--batch-size", "8")
    fourm("evaluate", "--root", root, "--scenes", "4", "--samples", "2", "--pictures", "2")
    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (300, 200), (90, 120, 40)).save(photo)
    out = tmp_path / "out"
    fourm("generate", "--root", root, "--from", f"rgb={photo}", "--to", "depth,caption",
          "--out", str(out))  # fmt: skip
    assert {path.suffix for path in out.rglob("*") if path.is_file()} >= {".png", ".txt"}
    assert "tokens" in fourm("status", "--root", root)
    fourm("verify", "--root", root, "--deep")
    assert verify(Store(root), deep=True).problems == []
