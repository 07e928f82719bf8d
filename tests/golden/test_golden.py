"""Contracts of `python -m tests.golden`, on a folder made here."""

from __future__ import annotations

import json
import math
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from models.fourm.schedules import token_schedule
from tests.golden.__main__ import main
from tests.golden.registry import close, exact, find, relative


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One case, of decoding schedules."""
    entry = {"steps": 4, "tokens": 16}
    info = {kind: [{**entry, "schedule": token_schedule(kind, 4, 16)}]
            for kind in ("cosine", "linear")}
    write(tmp_path, "schedules", {**info, "temperature": []})
    return tmp_path


def write(folder: Path, name: str, info: dict) -> None:
    (folder / f"{name}.json").write_text(json.dumps(info), encoding="utf-8")


def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = main([str(folder)])
    return status, capsys.readouterr().out


def test_a_case_that_agrees_is_one_line_and_success(folder, capsys):
    status, out = run(folder, capsys)
    assert status == 0
    assert out.startswith("ok   schedules")
    assert "(2 compared, 0 wrong)\n1 of 1 cases agree" in out


def test_a_mismatch_fails(folder, capsys):
    info = json.loads((folder / "schedules.json").read_text())
    info["linear"][0]["schedule"][0] += 1
    write(folder, "schedules", info)
    status, out = run(folder, capsys)
    assert status == 1
    assert "linear 4 of 16: 1, tolerance 0 (2 compared, 1 wrong)" in out


def test_an_unknown_case_fails_even_if_it_has_no_description(folder, capsys):
    (folder / "novelty.safetensors").write_bytes(b"")
    status, out = run(folder, capsys)
    assert status == 1
    assert "FAIL novelty                  unknown case" in out
    assert "ok   schedules" in out


def test_an_error_in_one_case_does_not_hide_the_others(folder, capsys):
    write(folder, "masking", {"novel_part": []})
    status, out = run(folder, capsys)
    assert status == 1
    assert "ValueError: unknown parts: novel_part" in out
    assert "ok   schedules" in out


def test_files_must_be_those_of_the_manifest(folder, capsys):
    listed = {name: {"sha256": sha256((folder / "schedules.json").read_bytes()).hexdigest()}
              for name in ("schedules.json", "schedules.safetensors")}
    write(folder, "MANIFEST", listed)
    status, out = run(folder, capsys)
    assert status == 1
    assert "schedules.safetensors is missing" in out


def test_comparisons_are_infinite_where_they_mean_nothing():
    assert math.isinf(close("x", [1.0], [1.0, 2.0], 1.0).error)
    assert math.isinf(close("x", [math.nan], [1.0], 1.0).ratio)
    assert exact("x", [1, 2, 3], [1, 3, 2]).error == 2
    assert relative("x", np.array([0.0, 99.0]), np.array([0.0, 100.0]), 1.0).error \
        == pytest.approx(0.01)


def test_the_longest_pattern_wins():
    assert find("fmvit") is not find("fm_x")
    assert find("never heard of") is None
