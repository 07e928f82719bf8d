"""Gradients of tables, collected by rows, against those that autograd fills."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from models.fourm.batch import from_released
from models.fourm.model import FourM
from tasks.gradients import Gradients
from tests.models.tiny import CONFIG, make, released


def backward(model: FourM, parts: int = 1) -> None:
    batch = from_released(released(), CONFIG, 10, 8)
    for _ in range(parts):
        model(batch).total.backward()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_what_tables_collect_adds_up_to_what_autograd_fills(tied: bool, parts: int):
    torch.manual_seed(0)
    plain = FourM(dataclasses.replace(CONFIG, tie_embeddings=tied))
    rows = FourM(plain.config)
    rows.load_state_dict(plain.state_dict())
    backward(plain, parts)
    gradients = Gradients(rows, by_rows=True)
    backward(rows, parts)
    assert rows.enc_tokens.weight.grad is None
    gradients.fill()
    for (name, ours), theirs in zip(rows.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, name
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    wanted = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()
                                            if p.grad is not None])
    torch.testing.assert_close(gradients.norm(), wanted)
    torch.testing.assert_close(Gradients(plain, by_rows=False).norm(), wanted)
    gradients.divide(torch.tensor(2.0))
    torch.testing.assert_close(gradients.norm(), wanted / 2)


def test_rows_of_one_step_are_gone_at_the_next_even_if_they_were_not_finite():
    model = make()
    gradients, table = Gradients(model, by_rows=True), model.enc_tokens
    for rows, value in (([1, 2, 1], torch.nan), ([3], 2.0)):
        table.collected.append((torch.tensor(rows), torch.full((len(rows), CONFIG.dim), value)))
        gradients.fill()
        found = table.weight.grad
        model.zero_grad(set_to_none=True)
        if value == 2.0:
            assert found.nonzero()[:, 0].unique().tolist() == [3]
        gradients.clear()
    assert not found.any()


def test_a_closed_collection_leaves_gradients_to_autograd():
    model = make()
    Gradients(model, by_rows=True).close()
    backward(model)
    assert model.enc_tokens.weight.grad.any()
