"""Contracts of the one trainer, on a two-layer network and a file store."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from infra.store import Store
from tasks.optim import learning_rate_scale
from tasks.run_store import Checkpoints, read_curve
from tasks.trainer import Task, TrainConfig, Trainer


class Regression(Task):
    """Learns y = 2x with dropout; may stop like a killed process or emit a broken batch."""

    def __init__(self, *, die_at: int | None = None, broken_at: int | None = None) -> None:
        self.die_at, self.broken_at = die_at, broken_at

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 4))

    def batch(self, step: int, rank: int, world: int) -> torch.Tensor:
        if step == self.die_at:
            raise KeyError("killed")
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (x * float("nan") if step == self.broken_at else x)[rank::world]

    def loss(self, model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, dict]:
        loss = (model(batch) - 2 * batch).square().mean()
        return loss, {"error": loss.detach().sqrt()}

    def is_hidden(self, name: str) -> bool:
        return name == "0.weight"


CONFIG = TrainConfig(
    steps=12, batch_size=8, lr=1e-2, warmup_steps=2, precision="fp32", log_every=2,
    checkpoint_seconds=0.0,
)


def test_a_killed_and_resumed_run_ends_in_the_same_bits(tmp_path):
    store = Store(str(tmp_path))
    whole = Trainer(store, "whole", Regression(), CONFIG).fit().model
    with pytest.raises(KeyError, match="killed"):
        Trainer(store, "cut", Regression(die_at=7), CONFIG).fit()
    assert Checkpoints(store, "cut").steps()[-1] == 7
    resumed = Trainer(store, "cut", Regression(), CONFIG).fit().model
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    steps = [line["step"] for line in read_curve(store, "cut") if "grad_norm" in line]
    assert steps == sorted(steps)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    store = Store(str(tmp_path))
    Trainer(store, "run", Regression(), CONFIG).fit()
    checkpoints = Checkpoints(store, "run")
    older, newest = checkpoints.steps()
    store.write(f"run/checkpoints/step-{newest:08d}/model.safetensors", b"torn")
    assert checkpoints.newest()[1]["step"] == older


def test_non_finite_steps_are_skipped_and_counted(tmp_path):
    result = Trainer(Store(str(tmp_path)), "run", Regression(broken_at=3), CONFIG).fit()
    assert result.skipped == 1
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


def test_progress_reports_every_point_of_the_curve(tmp_path):
    seen = []
    Trainer(Store(str(tmp_path)), "run", Regression(), CONFIG).fit(
        lambda step, total, metrics: seen.append((step, total, sorted(metrics)))
    )
    assert [step for step, _, _ in seen] == [2, 4, 6, 8, 10, 12]
    assert "error" in seen[0][2]


def test_another_configuration_under_the_same_name_is_refused(tmp_path):
    store = Store(str(tmp_path))
    Trainer(store, "run", Regression(), CONFIG).fit()
    other = dataclasses.replace(CONFIG, lr=3e-3)
    with pytest.raises(ValueError, match=r"lr=0\.01, now it is 0\.003"):
        Trainer(store, "run", Regression(), other).fit()


@pytest.mark.parametrize("field", ["steps", "batch_size", "lr"])
def test_settings_that_cannot_train_are_named(field):
    with pytest.raises(ValueError, match=f"{field} must be positive"):
        dataclasses.replace(CONFIG, **{field: 0})


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_learning_rate_rises_then_falls_to_its_minimum(schedule):
    scales = [
        learning_rate_scale(s, 100, warmup=10, min_ratio=0.1, schedule=schedule)
        for s in range(100)
    ]
    assert scales[0] < 0.1 < max(scales) == 1.0
    assert scales[10:] == sorted(scales[10:], reverse=True)
    assert scales[-1] == pytest.approx(0.1, abs=0.04)


@pytest.mark.slow
def test_two_gloo_workers_train_what_one_process_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    import ray

    from tasks.distributed import fit_distributed

    store = Store(str(tmp_path))
    config = dataclasses.replace(CONFIG, steps=4, log_every=1)
    seen: list[tuple[int, int]] = []
    ray.init(num_cpus=3, include_dashboard=False, _node_ip_address="127.0.0.1")
    try:
        result = fit_distributed(
            store, "two", Linear(), config, num_workers=2,
            on_progress=lambda step, steps, metrics: seen.append((step, steps)),
        )
    finally:
        ray.shutdown()
    assert result.steps == 4
    # What the workers log reaches the process that shows it, the last point by its end at least.
    assert seen == sorted(seen)
    assert seen[-1] == (4, 4)
    one = Trainer(store, "one", Linear(), config).fit().model.state_dict()
    two, _ = Checkpoints(store, "two").newest()
    for name, value in two["model"].items():
        assert torch.allclose(value, one[name], atol=1e-6)


class Linear(Regression):
    """Without dropout, whose draws depend on the rank."""

    def build_model(self) -> nn.Module:
        return nn.Linear(4, 4)
