"""Optimisers of the one trainer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tasks.optim import build_optimizers, update

SMALLEST = torch.finfo(torch.float32).tiny


def _faded() -> torch.optim.Optimizer:
    """AdamW whose moments of one row stand at the smallest normal number, without a gradient."""
    table = nn.Embedding(40, 8)
    [optimizer] = build_optimizers(table, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0,
                                   is_hidden=lambda name: False)
    table.weight.grad = torch.ones(40, 8)
    update([optimizer])
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[table.weight][name][3] = SMALLEST
    table.weight.grad[3] = 0.0
    return optimizer


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this CPU cannot flush denormals")
def test_moments_of_rows_that_fade_end_at_zero_and_all_others_live_on():
    optimizer = _faded()
    update([optimizer])
    [state] = optimizer.state.values()
    for name in ("exp_avg", "exp_avg_sq"):
        assert (state[name] == 0).nonzero()[:, 0].unique().tolist() == [3]
    assert float(torch.tensor(SMALLEST / 4) * 1) > 0, "flushed outside of updates"


def test_an_update_that_fails_leaves_numbers_as_they_were():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):  # type: ignore[override]
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        update([Broken([torch.ones(1, requires_grad=True)])])
    assert float(torch.tensor(SMALLEST / 4) * 1) > 0
