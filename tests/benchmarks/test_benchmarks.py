"""Benchmarks can be found, what they leave says all that a reader needs, and both sides of a
comparison see the same batch."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import fields

import pytest
import torch

from models.fourm.batch import from_released
from tests.benchmarks.__main__ import BENCHMARKS, main
from tests.benchmarks.measure import Record, cases, rounds
from tests.benchmarks.seven import random_batches, released_batch, seven

REQUIRED = {
    "name", "unit", "ours", "bare", "peer", "ratio", "shape", "dtype", "threads", "machine",
    "commit", "date",
}  # fmt: skip


def test_every_benchmark_is_listed_and_exists(capsys):
    main(["--list"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["fetch", "train_step", "loader", "label", "tokenize", "scale",
                      "tokenizer_quality", "generate", "encode"]
    for name, (module, _) in BENCHMARKS.items():
        assert callable(getattr(importlib.import_module(f"tests.benchmarks.{module}"), name))


def test_a_record_holds_figure_shape_machine_commit_and_date(tmp_path):
    out = tmp_path / "records.json"
    main(["encode", "--json", str(out), "--dtype", "fp32", "--seconds", "0", "--threads", "1"])
    records = json.loads(out.read_text())
    assert [record["name"] for record in records] == ["encode.tiny.rgb", "encode.tiny.several"]
    for record in records:
        assert record.keys() >= REQUIRED
        assert record["ours"] > 0
        assert record["also"].keys() >= {"tokens_per_second", "peak_mb"}
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


def test_a_path_that_is_no_checkout_is_refused_by_what_it_lacks(tmp_path):
    with pytest.raises(SystemExit, match=r"no checkout .*lacks fourm/models/fm\.py: git clone"):
        main(["train_step", "--peer", str(tmp_path)])


def test_only_the_cases_asked_for_are_measured_and_each_tells_when_it_begins_and_ends(capsys):
    record = Record(name="b.200", unit="x/s", ours=2.0, shape={}, dtype="none", threads=1)
    named = {"a.2": lambda: pytest.fail("not asked for"), "b.200": lambda: record}
    assert cases(named, "200") == [record]
    assert cases(named | {"b.2000": named["a.2"]}, "b.200") == [record]
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.splitlines() == ["b.200 ...", "b.200 took 0 s"] * 2


def test_a_call_that_runs_elsewhere_counts_by_its_own_clock():
    assert rounds([lambda: 3.5], 0) == [[3.5, 3.5]]


def test_what_the_released_code_gets_is_the_same_batch():
    config = seven("tiny")
    (batch,) = random_batches(config, 2, 1)
    entries: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in released_batch(batch, config).items():
        modality, key = name.rsplit(".", 1)
        entries.setdefault(modality, {})[key] = value
    back = from_released(entries, config, 128, 128)
    for field in fields(batch):
        if field.name not in ("counts", "dense", "enc_sizes", "parts"):
            given, found = getattr(batch, field.name), getattr(back, field.name)
            assert torch.equal(given, found), field.name
    ours, theirs = (part.dense["rgb@224"] for part in (batch, back))
    assert torch.equal(ours.slots, theirs.slots)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = (ours.values.view(-1, 3) / 255 - mean) / std
    torch.testing.assert_close(normal.view(ours.values.shape), theirs.values)
