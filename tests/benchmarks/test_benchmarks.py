"""Benchmarks can be found, what they leave says all that a reader needs, and both sides of a
comparison see the same batch."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import fields

import pytest
import torch

from models.fourm.batch import from_released
from tests.benchmarks import networks
from tests.benchmarks.__main__ import BENCHMARKS, main
from tests.benchmarks.measure import Options, Record, cases, rounds
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


def small(monkeypatch, cores: int) -> None:
    """Cases of a moment, on a machine of so many cores as far as benchmarks know."""
    monkeypatch.setattr(networks, "cores", lambda: cores)
    tiny = {"hidden_size": 32, "num_attention_heads": 2, "image_size": 32}
    monkeypatch.setattr(networks, "LABEL", (networks.Case("label.20", "clip", 4, 48, tiny),))
    changes = {"width": 32, "encoder_depth": 1}
    tokens = networks.Case("tokenize.20", "rgb", 4, 128, changes)
    monkeypatch.setattr(networks, "TOKENIZE", (tokens,))


@pytest.mark.parametrize("name", ["label", "tokenize"])
def test_an_engine_has_a_ratio_with_a_core_of_its_own_and_one_on_those_of_its_network(
    tmp_path, monkeypatch, name
):
    small(monkeypatch, cores=2)
    out = tmp_path / "records.json"
    main([name, "--json", str(out), "--dtype", "fp32", "--seconds", "0"])
    (record,) = json.loads(out.read_text())
    assert record.keys() >= REQUIRED
    assert record["threads"] == 1
    assert record["ratio"] == pytest.approx(record["ours"] / record["bare"], abs=1e-3)
    also = record["also"]
    assert also.keys() >= {"cpu_ms", "cpu_ms_bare"}
    assert 0 < also["busy"] < 1
    if networks.TASKS.is_dir():
        assert 0 < also["busy_shared"] < 1
        shared = also["ours_shared"] / record["bare"]
        assert also["ratio_shared"] == pytest.approx(shared, abs=1e-3)
        assert also["cpu_ms_shared"] > 0


@pytest.mark.skipif(not networks.TASKS.is_dir(), reason="the system lets nobody choose cores")
def test_sides_of_a_comparison_run_on_the_cores_that_their_names_say():
    found: dict[str, list[int]] = {"ours": [], "bare": []}
    calls = [lambda side=side: found[side].append(len(os.sched_getaffinity(0))) for side in found]
    allowed = os.sched_getaffinity(0)
    networks._compare(*calls, 1, Options(dtype="fp32", seconds=0), networks._Watch())
    assert found["ours"][:2] == [min(2, len(allowed)), 1]
    assert set(found["bare"]) == {1}
    assert os.sched_getaffinity(0) == allowed


@pytest.mark.parametrize("name", ["label", "tokenize"])
def test_without_a_core_for_the_engine_nothing_is_measured(monkeypatch, name):
    small(monkeypatch, cores=2)
    message = r"a core beside the 2 of the network \(--threads\), and this process may run on 2"
    with pytest.raises(SystemExit, match=message):
        main([name, "--dtype", "fp32", "--threads", "2"])


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
            assert torch.equal(getattr(batch, field.name), getattr(back, field.name)), field.name
    ours, theirs = (part.dense["rgb@224"] for part in (batch, back))
    assert torch.equal(ours.slots, theirs.slots)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = (ours.values.view(-1, 3) / 255 - mean) / std
    torch.testing.assert_close(normal.view(ours.values.shape), theirs.values)


def test_tf32_is_measured_where_something_trains_in_it():
    with pytest.raises(SystemExit, match="encode knows fp32 and bf16"):
        main(["encode", "--dtype", "tf32"])
