"""Contracts of learning rates, of which parameters which optimizer gets, and of their mean."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tasks.ema import WeightMean
from tasks.optim import build_optimizers, learning_rate_scale


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_learning_rate_rises_then_falls_to_its_minimum(schedule):
    scales = [
        learning_rate_scale(s, 100, warmup=10, min_ratio=0.1, schedule=schedule)
        for s in range(100)
    ]
    assert scales[0] < 0.1 < max(scales) == 1.0
    assert scales[10:] == sorted(scales[10:], reverse=True)
    assert scales[-1] == pytest.approx(0.1, abs=0.04)


@pytest.mark.parametrize(("schedule", "expected"), [
    ("cosine", {0: 1 / 11, 9: 10 / 11, 10: 1.0, 55: 0.55, 100: 0.1, 120: 0.1}),
    ("wsd", {0: 1 / 11, 9: 10 / 11, 10: 1.0, 55: 1.0, 73: 1.0, 86.5: 0.55, 100: 0.1, 120: 0.1}),
])
def test_learning_rates_between_start_and_end(schedule, expected):
    for step, scale in expected.items():
        found = learning_rate_scale(step, 100, warmup=10, min_ratio=0.1, schedule=schedule)
        assert found == pytest.approx(scale), step


def test_matrices_are_decayed_and_hidden_ones_go_to_muon():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4), nn.Embedding(3, 4))
    model[3].weight.requires_grad_(False)
    adam, muon = build_optimizers(model, lr=0.1, betas=(0.8, 0.9), weight_decay=0.05,
                                  is_hidden=lambda name: name.startswith("2."))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [({names[p] for p in group["params"]}, group["weight_decay"], group["lr"])
             for optimizer in (adam, muon) for group in optimizer.param_groups]
    assert found == [({"0.weight"}, 0.05, 0.1),
                     ({"0.bias", "1.weight", "1.bias", "2.bias"}, 0.0, 0.1),
                     ({"2.weight"}, 0.05, 0.1)]
    assert adam.param_groups[0]["betas"] == (0.8, 0.9)
    assert isinstance(muon, torch.optim.Muon)
    rest = build_optimizers(model, lr=0.1, betas=(0.8, 0.9), weight_decay=0.05,
                            is_hidden=lambda name: False)
    assert [type(each) for each in rest] == [torch.optim.AdamW]


def test_the_mean_of_weights_forgets_the_first_soon_and_takes_whole_numbers_as_they_are():
    weight, count = torch.full((2,), 8.0), torch.tensor([1])
    mean, expected = WeightMean({"weight": weight, "count": count}, decay=0.3), 8.0
    for step, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 0.3, 0.3)):
        weight.mul_(-1.5)
        count.add_(1)
        mean.update(step)
        expected = decay * expected + (1 - decay) * float(weight[0])
        assert mean.tensors["weight"].tolist() == pytest.approx([expected] * 2)
        assert mean.tensors["count"].tolist() == [step + 2]
    mean.apply()
    assert weight.tolist() == pytest.approx([expected] * 2)
