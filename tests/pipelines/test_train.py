"""The flow `train`: what it shows while it trains, and which settings reach the trainer."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from infra import ui
from infra.ledger import Ledger, ShardData, Stage
from infra.manifest import publish
from infra.shards import write_tar
from infra.store import Store
from pipelines import train as flow
from pipelines import train_tokenizers as tokenizers
from pipelines.params import TrainParams, TrainTokenizersParams
from tasks.mixture import open_sets
from tasks.recipes import recipe
from tasks.report import pace_figure
from tasks.train import RunInfo

METRICS = {"loss": 2.0, "loss/depth": 1.5, "lr": 1e-3, "grad_norm": 0.7, "mfu": 0.3,
           "tokens_per_second": 300.0, "tokens_per_second/depth": 100.0,
           "samples_per_second": 9.0}  # fmt: skip


def test_the_pace_of_a_training_has_a_panel_for_each_of_its_measures() -> None:
    figure = pace_figure([{"step": step, **METRICS} for step in (1, 2, 3)])
    panels = {axes.get_title(): [line.get_label() for line in axes.lines] for axes in figure.axes}
    assert panels.keys() == {
        "learning rate", "gradient norm", "tokens a second", "share of peak FLOP/s"
    }
    assert panels["tokens a second"] == ["all", "depth"]
    assert all(panels.values())


def test_losses_and_pace_are_pictures_in_the_ui_while_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[str, tuple[int, ...]]] = []
    monkeypatch.setattr(ui, "in_run", lambda: True)
    monkeypatch.setattr(ui, "gallery", lambda key, pictures, title: shown.append(
        (key, np.shape(pictures[0][1]))))  # fmt: skip
    monkeypatch.setattr(ui.Progress, "_show", lambda *_: None)
    monkeypatch.setattr(flow, "CURVE_SECONDS", 0.0)
    store = Store(str(tmp_path))
    lines = [{"step": step, **METRICS} for step in (10, 20, 30)]
    store.write("runs/r/curve.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    curve = flow.LiveCurve(store, "r")
    curve.add(20, 40, METRICS)  # goes on from a checkpoint at step 10
    assert [point["step"] for point in curve._points] == [10, 20]
    assert [key for key, _ in shown] == ["r-loss", "r-pace"]
    assert all(shape[2] == 3 and shape[0] > 100 for _, shape in shown)


def test_the_form_decides_how_the_recipe_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def train(store: Any, data: Any, recipe: Any, **options: Any) -> RunInfo:
        asked.append((recipe, options["run"], options["num_workers"]))
        return RunInfo("runs/x", 1, 1.0, 1.0, {}, 0)

    monkeypatch.setattr(flow, "train_fourm", train)
    monkeypatch.setattr(flow, "open_sets", lambda *_: {})
    params = TrainParams(
        root=str(tmp_path), run="x", steps=20, ema=0.99, parallel="fsdp", accumulate=2, lora=4,
        recompute=True, compile=True, wandb="project", freeze=["encoder.*"], start="none", seed=3,
    )  # fmt: skip
    flow.train_model.fn(params)
    (recipe, run, workers), = asked
    config = recipe.training
    assert (run, workers, config.steps, config.seed) == ("x", 0, 20, 3)
    assert (config.ema_decay, config.finish_with_ema) == (0.99, True)
    assert (config.parallel, config.accumulate, config.recompute) == ("fsdp", 2, True)
    assert (config.compile, config.wandb) == (True, "project")
    assert (recipe.freeze, recipe.lora.rank, recipe.start) == (("encoder.*",), 4, "none")


@pytest.mark.parametrize(("where", "waits"), [
    ({"ray": "auto", "gpus": 1}, True), ({"ray": "auto"}, False), ({"gpus": 1}, False),
])
def test_workers_wait_for_gpus_where_they_are_asked_for_and_ray_may_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: dict[str, Any], waits: bool
) -> None:
    asked: list[bool] = []

    def train(*_: Any, **options: Any) -> RunInfo:
        asked.append(options["on_gpus"])
        return RunInfo("runs/x", 1, 1.0, 1.0, {}, 0)

    monkeypatch.setattr(flow, "train_fourm", train)
    monkeypatch.setattr(flow, "open_sets", lambda *_: {})
    monkeypatch.setattr(flow, "ray_session", nullcontext)
    flow.train_model.fn(TrainParams(root=str(tmp_path), run="x", train_workers=2, **where))
    assert asked == [waits]


def test_the_form_says_what_a_tokenizers_training_occupies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    dataset = SimpleNamespace(sources={}, recipes={}, tokenizer_shards=[], text_recipe=None)
    monkeypatch.setattr(tokenizers.chain, "Chain", lambda _: dataset)
    monkeypatch.setattr(
        tokenizers, "train_tokenizers", lambda *_, **options: asked.append(options) or {}
    )
    params = TrainTokenizersParams(root=str(tmp_path), ray="auto", workers=8, gpus=0.5)
    assert tokenizers.learn_codes.fn(params) == []
    assert (asked[0]["workers"], asked[0]["gpus"], asked[0]["target"]) == (8, 0.5, params.ray)


def test_more_training_workers_than_this_machine_has_gpus_are_refused_instead_of_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.ray_session.gpus", lambda: 1)
    with pytest.raises(ValueError, match=r"2 training workers take a GPU each, .* has 1"):
        flow.train_model.fn(TrainParams(root=str(tmp_path), train_workers=2))


def test_a_run_that_was_cut_off_before_the_set_was_published_anew_can_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, chosen = Store(str(tmp_path)), recipe("any")
    stage = Stage("tokens:depth", 1, {}, ("tok_depth",))
    for shard in (0, 1):
        data = ShardData([], {"tok_depth": write_tar([])}, [], 1.0)
        Ledger(store).commit(stage, shard, data)
        publish(Ledger(store), "main", {"tok_depth": stage}, range(shard + 1))
    (_, old), = open_sets(store, chosen, "main@1").popitem()[1]
    (_, new), = open_sets(store, chosen, "main").popitem()[1]
    assert (old.version, new.version) == (1, 2)
    with pytest.raises(ValueError, match=r"has the versions \[1, 2\], not 3"):
        open_sets(store, chosen, "main@3")
    older = flow.run_name(old, chosen)
    store.write_json(f"runs/{older}/checkpoints/step-00000010/state.json", {})
    assert flow._run_of(store, old, chosen) == older
    assert not caplog.records
    assert flow._run_of(store, new, chosen) != older
    assert f"{older} was cut off" in caplog.text
    assert "--manifest main@1 goes on" in caplog.text
    store.write_json(f"runs/{older}/run.json", {})
    assert flow.cut_off(store, new, chosen) == {}
