"""The loss over several vocabularies against torch's cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.fourm import losses
from models.fourm.batch import IGNORED
from models.fourm.losses import summed_losses

SIZES, ROWS, DIM = (7, 30, 11), (5, 64, 0), 8


def _given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    targets = [torch.randint(0, size, (rows,)) for size, rows in zip(SIZES, ROWS, strict=True)]
    targets[1][10:20] = IGNORED
    hidden = torch.randn(sum(ROWS), DIM, dtype=dtype, requires_grad=True)
    return hidden, torch.randn(sum(SIZES), DIM, requires_grad=True), targets


def _plain(hidden: Tensor, weight: Tensor, targets: list[Tensor]) -> Tensor:
    parts = zip(hidden.split(ROWS), weight.split(SIZES), targets, strict=True)
    return torch.stack([F.cross_entropy(F.linear(x, w).float(), ids, ignore_index=IGNORED,
                                        reduction="sum") for x, w, ids in parts])


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_losses_and_gradients_are_those_of_cross_entropy(monkeypatch, block):
    monkeypatch.setitem(losses._BLOCK, "cpu", block)
    factors = torch.tensor([0.3, 0.01, 2.0])
    found = []
    for compute in (lambda *given: summed_losses(*given, SIZES), _plain):
        hidden, weight, targets = _given()
        loss = compute(hidden, weight, targets)
        (loss * factors).sum().backward()
        found.append((loss, hidden.grad, weight.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_gives_what_it_gives_cross_entropy_up_to_its_rounding():
    found = []
    for compute in (lambda *given: summed_losses(*given, SIZES), _plain):
        hidden, weight, targets = _given()
        with torch.autocast("cpu", torch.bfloat16):
            loss = compute(hidden, weight, targets)
        loss.sum().backward()
        assert weight.grad.dtype == hidden.grad.dtype == torch.float32
        found.append((loss, hidden.grad, weight.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_without_gradients_losses_stay_what_they_are_and_a_frozen_matrix_gets_none():
    hidden, weight, targets = _given()
    with torch.no_grad():
        torch.testing.assert_close(summed_losses(hidden, weight, targets, SIZES),
                                   _plain(hidden, weight, targets))
    frozen = weight.detach()
    summed_losses(hidden, frozen, targets, SIZES).sum().backward()
    assert frozen.grad is None
    assert hidden.grad.abs().sum() > 0
