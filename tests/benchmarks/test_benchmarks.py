"""Benchmarks can be found, and what they leave says all that a reader needs."""

from __future__ import annotations

import importlib
import json

from tests.benchmarks.__main__ import BENCHMARKS, main

REQUIRED = {
    "name", "unit", "ours", "bare", "ratio", "shape", "dtype", "threads", "machine", "commit",
    "date",
}  # fmt: skip


def test_every_benchmark_is_listed_and_exists(capsys):
    main(["--list"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["train_step", "loader", "label", "tokenize", "scale", "generate"]
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
