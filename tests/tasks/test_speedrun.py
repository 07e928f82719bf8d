"""Contracts of the speedrun: a set that is always the same, a clock that survives, a board that
only records what is faster."""

from __future__ import annotations

import dataclasses
import datetime
import math

import numpy as np
import pytest

from infra import machine
from infra.scenes import CLASSES, render, sample_scene
from infra.store import Store
from models.fourm.masking import Component, Mixture
from tasks import speedrun_set
from tasks.recipes import TrainRecipe, recipe
from tasks.speedrun import SCORE, Outcome, read_board, record, speedrun
from tasks.speedrun_set import CODES, GRIDS, cells, make_set, semseg_tokens, set_digest
from tasks.trainer import TrainConfig

SCENES = 12
TINY = TrainRecipe(
    network={"dim": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2},
    mixture=Mixture(components=(
        Component(inputs={"rgb": 1.0}, targets={"*": 1.0}, num_inputs=(16, 16),
                  num_targets=(32, 32)),
    ), per_batch=True),
    training=TrainConfig(steps=6, batch_size=4, lr=1e-3, warmup_steps=1, precision="fp32",
                         log_every=2, eval_every=2, checkpoint_seconds=0.0),
    max_text=64, val_samples=4,
)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(speedrun_set, "SHARD_ROWS", 8)
    return Store(str(tmp_path / "data"))


def test_tokens_lie_within_their_vocabularies_and_follow_the_scene():
    scene = render(sample_scene(3), speedrun_set.SIDE)
    for name, tokens in GRIDS.items():
        ids = tokens(scene)
        assert ids.shape == (64,)
        assert 0 <= ids.min() <= ids.max() < CODES[name]
        assert len(set(ids.tolist())) > 1
    np.testing.assert_array_equal(cells(np.arange(16).reshape(4, 4, 1), 2)[1, :, 0], [2, 3, 6, 7])
    plain = semseg_tokens(np.full((128, 128), 1))
    assert set(plain.tolist()) == {sum(len(CLASSES) ** i for i in range(4))}


def test_the_set_is_the_same_wherever_it_is_made_and_is_made_once(store, tmp_path, monkeypatch):
    first = make_set(store, scenes=SCENES)
    other = make_set(Store(str(tmp_path / "other")), scenes=SCENES)
    assert set_digest(first) == set_digest(other)
    assert (first.samples(0), first.samples(1)) == (8, 4)
    monkeypatch.setattr(speedrun_set, "render", None)
    assert make_set(store, scenes=SCENES) == first


def test_a_run_ends_where_the_target_is_reached(store):
    easy = speedrun(store, TINY, scenes=SCENES, target=100.0)
    assert (easy.reached, easy.steps) == (True, 2)
    assert easy.tokens == 2 * 4 * (16 + 32)
    assert easy.flops > 6 * easy.tokens * 16 * 16
    assert easy.score < 100
    assert speedrun(store, TINY, scenes=SCENES, target=100.0) == easy
    hard = speedrun(store, TINY, scenes=SCENES, target=1e-6)
    assert (hard.reached, hard.steps) == (False, 6)
    assert math.isfinite(hard.score)
    assert "missed 1e-06" in str(hard)


def test_a_run_that_was_cut_off_goes_on_with_its_clock(store, monkeypatch):
    whole = speedrun(store, dataclasses.replace(TINY, val_samples=3), scenes=SCENES, target=1e-6)
    seen: list[int] = []

    def die(step: int, steps: int, metrics: dict[str, float]) -> None:
        seen.append(step)
        assert SCORE in metrics
        if step == 4:
            raise KeyError("killed")

    with pytest.raises(KeyError, match="killed"):
        speedrun(store, TINY, scenes=SCENES, target=1e-6, on_progress=die)
    clock = next(name for name in store.list("runs/") if name.endswith("clock.json")
                 and not store.exists(name.replace("clock", "speedrun")))
    spent = store.read_json(clock)
    spent["2"] = 1000.0
    store.write_json(clock, spent)
    rest = speedrun(store, TINY, scenes=SCENES, target=1e-6,
                    on_progress=lambda step, *_: seen.append(step))
    assert seen in ([2, 4, 4, 6], [2, 4, 6])
    assert rest.steps == whole.steps
    assert rest.seconds > 1000


def test_a_recipe_must_measure_where_it_logs(store):
    odd = dataclasses.replace(TINY, training=dataclasses.replace(TINY.training, eval_every=4))
    with pytest.raises(ValueError, match="eval_every equal to log_every, got 4 and 2"):
        speedrun(store, odd, scenes=SCENES)


def test_the_shipped_entry_can_be_run():
    training = recipe("speedrun").training
    assert 0 < training.eval_every == training.log_every < training.steps


def test_the_board_takes_only_what_is_faster_and_committed(tmp_path, monkeypatch):
    board = tmp_path / "board.jsonl"
    commit = "0123456789ab"
    monkeypatch.setattr(machine, "commit_hash", lambda: commit)
    run = Outcome(True, 0.49, 0.5, 100, 60.0, 1e6, 1e12, "set", "recipe")

    def add(outcome: Outcome) -> str:
        return record(board, outcome, note="first",
                      now=lambda: datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC))

    assert "recorded in" in add(run)
    assert "not recorded: the best here took 60.0 s" in add(run)
    assert "was not reached" in add(dataclasses.replace(run, seconds=1.0, reached=False))
    assert "20.0 s faster" in add(dataclasses.replace(run, seconds=40.0))
    assert "recorded in" in add(dataclasses.replace(run, set="other"))
    lines = read_board(board)
    assert [line["seconds"] for line in lines] == [60.0, 40.0, 60.0]
    assert lines[0]["commit"] == commit
    assert lines[0]["date"] == "2026-01-02"
    assert lines[0]["machine"]["cores"] >= 1
    monkeypatch.setattr(machine, "commit_hash", lambda: f"{commit}-dirty")
    with pytest.raises(ValueError, match=r"has changes .*commit them first"):
        add(run)

