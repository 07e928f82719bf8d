"""The command `fourm speedrun`: what it prints, and that it refuses before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infra import machine
from pipelines import speedrun as command
from pipelines.params import SpeedrunParams
from tasks.speedrun import Outcome, read_board

OUTCOME = Outcome(True, 0.49, 0.5, 100, 60.0, 1e6, 1e12, "set", "recipe")


def test_the_outcome_is_printed_and_recorded_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def run(store: Any, recipe: Any, **options: Any) -> Outcome:
        asked.append(recipe.training.seed)
        return OUTCOME

    monkeypatch.setattr(command, "speedrun", run)
    monkeypatch.setattr(machine, "commit_hash", lambda: "0123456789ab")
    board = tmp_path / "board.jsonl"
    form = SpeedrunParams(root=str(tmp_path / "data"), seed=3, board=str(board))
    (line,) = command.run(form)
    assert "reached 0.5 with 0.4900 after 100 steps: 60.0 s, 1.00 M tokens, 1.00 TFLOP" in line
    assert (asked, board.exists()) == ([3], False)
    said = list(command.run(form.model_copy(update={"record": True, "note": "faster"})))
    assert said[1].startswith("recorded in")
    assert [line["note"] for line in read_board(board)] == ["faster"]


def test_a_checkout_with_changes_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "commit_hash", lambda: "0123456789ab-dirty")
    monkeypatch.setattr(command, "speedrun", None)
    with pytest.raises(ValueError, match="commit them first"):
        list(command.run(SpeedrunParams(root=str(tmp_path / "data"), record=True)))
    assert not (tmp_path / "data").exists()
