"""What the branches of a guided step see, and how their predictions are combined."""

from __future__ import annotations

import pytest
import torch

from models.fourm.conditions import FIRST, Shown
from models.fourm.guidance import Branch, Guidance, Inputs, combined
from models.fourm.spec import FourMConfig, ModalitySpec

CONFIG = FourMConfig(modalities=(
    ModalitySpec(name="depth", kind="img", max_tokens=4, vocab_size=9),
    ModalitySpec(name="normal", kind="img", max_tokens=4, vocab_size=9),
    ModalitySpec(name="text", kind="seq", max_tokens=6, vocab_size=400),
    ModalitySpec(name="words", kind="seq_emb", max_tokens=3, channels=2, is_target=False),
))
SHOWN = {
    "depth": Shown(torch.tensor([[1, 2, 3, 4]]), torch.ones(1, 4, dtype=torch.bool)),
    "text": Shown(torch.tensor([[301, 302, 3]]), torch.ones(1, 3, dtype=torch.bool)),
    "words": Shown(torch.ones(1, 2, 2), torch.ones(1, 2, dtype=torch.bool)),
    "normal": Shown(torch.tensor([[5, 6, 0, 0]]), torch.tensor([[True, True, False, False]])),
}
WHOLE = {"depth": [1, 2, 3, 4], "text": [301, 302, 3], "words": [[1, 1], [1, 1]], "normal": [5, 6]}
"""What is visible of each condition, the known part of the target among them."""


def seen(inputs: Inputs, row: int) -> dict[str, list]:
    """What a branch sees."""
    return {name: part.values[row][part.visible[row]].tolist() for name, part in inputs.items()}


def branches(guidance: Guidance) -> tuple[list[dict[str, list]], tuple[float, ...]]:
    inputs, weights = guidance.inputs(CONFIG, SHOWN, "normal")
    return [seen(inputs, row) for row in range(len(weights) + 1)], weights


def test_a_scale_of_one_needs_no_second_branch() -> None:
    assert branches(Guidance()) == ([WHOLE], ())
    assert branches(Guidance(scale=3.0, guided=frozenset())) == ([WHOLE], ())


def test_the_unconditional_branch_sees_the_target_alone_and_texts_as_wholly_masked() -> None:
    (base, full), weights = branches(Guidance(scale=3.0))
    assert weights == (3.0,)
    assert full == WHOLE
    assert base == {"depth": [], "text": [FIRST], "words": [[0, 0]], "normal": [5, 6]}


def test_conditions_that_are_not_guided_stay_in_all_branches() -> None:
    guidance = Guidance(scale=3.0, guided=frozenset({"depth"}))
    for one in (guidance, guidance.rows(torch.tensor([0]))):
        (base, full), weights = branches(one)
        assert weights == (3.0,)
        assert full == WHOLE
        assert base == {**WHOLE, "depth": []}


def test_weighted_conditions_are_seen_by_a_branch_each_and_the_others_by_all() -> None:
    found, weights = branches(Guidance(scale={"depth": 2.0, "text": -1.0}))
    assert weights == (2.0, -1.0)
    assert found == [{**WHOLE, "depth": [], "text": []}, {**WHOLE, "text": []},
                     {**WHOLE, "depth": []}]
    with pytest.raises(ValueError, match="guided by caption, but the conditions are"):
        branches(Guidance(scale={"caption": 1.0}))


def test_further_branches_see_their_own_conditions_beside_those_of_all() -> None:
    other = Branch({"depth": Shown(torch.tensor([[7, 7, 7, 7]]), SHOWN["depth"].visible)}, 0.5)
    found, weights = branches(Guidance(branches=[other]))
    assert weights == (0.5,)
    assert found == [WHOLE, {**WHOLE, "depth": [7, 7, 7, 7]}]
    with pytest.raises(ValueError, match="exclude each other"):
        Guidance(scale=2.0, branches=[other])
    Guidance(scale={"depth": 2.0}, branches=[other])


def test_predictions_move_from_the_unconditional_one_by_the_sum_of_weighted_differences() -> None:
    values = torch.tensor([[1.0, 0.0], [3.0, 1.0], [0.0, 5.0]])
    assert combined(values, (2.0, -1.0)).tolist() == [[1 + 2 * 2 + 1, 2 * 1 - 5]]
    assert combined(values[:2], (1.0,)).tolist() == [[3.0, 1.0]]
    assert combined(values, ()) is values
