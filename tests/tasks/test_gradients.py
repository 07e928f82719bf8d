"""Gradients of tables, collected by rows, against those that autograd fills; and clipping."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from infra.store import Store
from models.fourm.batch import from_released
from models.fourm.model import FourM
from tasks.gradients import Gradients
from tasks.optim import build_optimizers, learning_rate_scale
from tasks.trainer import Task, TrainConfig, Trainer
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


class Bursts(Task):
    """Every third batch has gradients ten thousand times as large; with Muon, or AdamW alone."""

    def __init__(self, hidden: bool) -> None:
        self.hidden = hidden

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 4))

    def batch(self, step: int, rank: int, world: int) -> torch.Tensor:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return x[rank::world] * (100 if step % 3 == 2 else 1)

    def loss(self, model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, dict]:
        return (model(batch) - 2 * batch).square().mean(), {}

    def is_hidden(self, name: str) -> bool:
        return self.hidden and name == "0.weight"


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("most", [0.0, 0.5])
def test_gradients_are_clipped_to_the_norm_as_by_torch(tmp_path, hidden, most):
    task = Bursts(hidden)
    config = TrainConfig(steps=12, batch_size=8, lr=1e-2, warmup_steps=2, precision="fp32",
                         log_every=2, clip_norm=most)
    found = Trainer(Store(str(tmp_path)), "run", task, config).fit()
    torch.manual_seed(config.seed)
    model, norms = task.build_model(), []
    optimizers = build_optimizers(model, lr=config.lr, betas=config.betas,
                                  weight_decay=config.weight_decay, is_hidden=task.is_hidden)
    for step in range(config.steps):
        task.loss(model, task.batch(step, 0, 1))[0].backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), most or 1e9)))
        rate = config.lr * learning_rate_scale(step, config.steps, warmup=config.warmup_steps,
                                               min_ratio=0.0, schedule="cosine")
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
    # Points are means over the steps since the last one; Muon rounds its products to bf16.
    assert found.metrics["grad_norm"] == pytest.approx(sum(norms[-2:]) / 2, rel=1e-3)
    for mine, reference in zip(found.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(mine, reference, atol=1e-5)
