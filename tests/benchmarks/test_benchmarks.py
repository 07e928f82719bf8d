"""Benchmarks can be found, and what they leave says all that a reader needs."""

from __future__ import annotations

import importlib
import json
import sys

import pytest

from tests.benchmarks.__main__ import BENCHMARKS, main

REQUIRED = {
    "name", "unit", "ours", "bare", "peer", "ratio", "shape", "dtype", "threads", "machine",
    "commit", "date",
}  # fmt: skip


def test_every_benchmark_is_listed_and_exists(capsys):
    main(["--list"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["fetch", "train_step", "loader", "label", "tokenize", "generate"]
    for name, (module, _) in BENCHMARKS.items():
        assert callable(getattr(importlib.import_module(f"tests.benchmarks.{module}"), name))


def test_a_record_holds_figure_shape_machine_commit_and_date(tmp_path):
    out = tmp_path / "records.json"
    main(["generate", "--json", str(out), "--dtype", "fp32", "--seconds", "0"])
    records = json.loads(out.read_text())
    assert [record["name"] for record in records] == ["generate.caption", "generate.depth"]
    for record in records:
        assert record.keys() >= REQUIRED
        assert record["ours"] > 0
        assert record["machine"]["cores"] >= 1


@pytest.mark.parametrize(
    ("python", "sentence"),
    [("", "no interpreter with img2dataset"), ("/nowhere/python", "does not run"),
     (sys.executable, "cannot import img2dataset")],
)  # fmt: skip
def test_a_peer_that_is_not_there_is_an_error_that_says_how_to_install_it(python, sentence):
    with pytest.raises(SystemExit, match=sentence) as error:
        main(["fetch", "--dtype", "fp32", "--peer", "img2dataset", "--peer-python", python])
    assert "pip install img2dataset" in str(error.value)
