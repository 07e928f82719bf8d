"""Contracts of runs that go on: what is damaged, what was measured, what was asked meanwhile."""

from __future__ import annotations

import dataclasses
import signal
import types

import pytest
import torch
from torch import nn

from infra.store import Store
from tasks.distributed import RESULT, fit_distributed
from tasks.ema import WeightMean
from tasks.optim import build_optimizers
from tasks.preemption import Stopped
from tasks.run_store import Checkpoints, Curve, TakenOver, read_curve
from tasks.train_state import snapshot, unique_tensors
from tasks.trainer import TrainConfig, Trainer
from tests.tasks.test_trainer import CONFIG, Linear, Regression


def killed(store: Store, step: int, config: TrainConfig = CONFIG) -> Checkpoints:
    """The checkpoints of "run", which goes on, or begins, and is killed at `step`."""
    with pytest.raises(KeyError, match="killed"):
        Trainer(store, "run", Regression(die_at=step), config).fit()
    return Checkpoints(store, "run")


def file_of(step: int, name: str) -> str:
    return f"run/checkpoints/step-{step:08d}/{name}"


@pytest.fixture
def sigterm():
    """Steps at which the handler that had SIGTERM before the training heard it."""
    heard: list[bool] = []
    previous = signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
    yield heard
    signal.signal(signal.SIGTERM, previous)


def test_checkpoints_made_after_damaged_ones_outlive_them(tmp_path):
    store = Store(str(tmp_path))
    for step in killed(store, 9).steps():
        store.write(file_of(step, "model.safetensors"), b"torn")
    checkpoints = killed(store, 4)
    assert checkpoints.newest()[1]["step"] == 4
    assert killed(store, 6).steps() == [5, 6]


class Joined(Linear):
    """Somebody else begins to train the same run at a step, to its end."""

    def __init__(self, store: Store, at: int) -> None:
        super().__init__()
        self.store, self.at = store, at

    def batch(self, step: int, rank: int, world: int) -> torch.Tensor:
        if step == self.at:
            self.other = Trainer(self.store, "run", Linear(), CONFIG).fit()
        return super().batch(step, rank, world)


def test_of_two_trainings_of_one_run_the_first_ends_and_the_other_goes_on_to_the_same_model(
    tmp_path,
):
    store = Store(str(tmp_path))
    whole = Trainer(store, "whole", Linear(), CONFIG).fit().model
    first = Joined(store, at=8)
    with pytest.raises(TakenOver, match=r"trains this run since .*; this one ends"):
        Trainer(store, "run", first, CONFIG).fit()
    assert torch.equal(first.other.model.weight, whole.weight)
    assert Checkpoints(store, "run").newest()[1]["step"] == CONFIG.steps


def test_parts_of_a_damaged_checkpoint_never_join_those_of_a_later_attempt(tmp_path):
    """Of other workers, say, whose first one would take up the digests that lie there."""
    store = Store(str(tmp_path))
    newest = killed(store, 6).steps()[-1]
    store.write(file_of(newest, "model.safetensors"), b"torn")
    store.write(file_of(newest, "rank-00001.json"), b"{}")
    killed(store, newest)
    assert not store.list(f"run/checkpoints/step-{newest:08d}/rank")


@pytest.mark.parametrize(("name", "content"), [
    ("model.safetensors", None), ("optimizer.safetensors", b""), ("state.json", b'{"step": 6'),
])
def test_a_checkpoint_that_lacks_a_part_falls_back_to_the_one_before(tmp_path, name, content):
    store = Store(str(tmp_path))
    checkpoints = killed(store, 6)
    older, newest = checkpoints.steps()
    if content is None:
        store.delete(file_of(newest, name))
    else:
        store.write(file_of(newest, name), content)
    assert checkpoints.newest()[1]["step"] == older
    # A worker that cannot read what the first one has read must not begin at another step.
    with pytest.raises((ValueError, FileNotFoundError), match=f"{newest:08d}/{name}"):
        checkpoints.newest(newest)


def test_a_run_killed_after_its_last_checkpoint_still_tells_how_it_trained(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    whole = Trainer(store, "whole", Regression(), CONFIG).fit()
    with monkeypatch.context() as patch:
        patch.setattr(Curve, "close", lambda _: (_ for _ in ()).throw(KeyError("killed")))
        killed(store, CONFIG.steps)
    assert Checkpoints(store, "run").newest()[1]["step"] == CONFIG.steps
    resumed = Trainer(store, "run", Regression(), CONFIG).fit()
    assert resumed.metrics.keys() == whole.metrics.keys()
    assert resumed.metrics["loss"] == whole.metrics["loss"]
    shown = [[line["step"] for line in read_curve(store, name)] for name in ("run", "whole")]
    assert shown[0] == shown[1]


def test_a_snapshot_stays_as_it_was_while_training_goes_on():
    """It is written by a thread meanwhile."""
    model = nn.Linear(4, 4)
    optimizers = build_optimizers(model, lr=0.1, betas=(0.9, 0.9), weight_decay=0.0,
                                  is_hidden=lambda name: False)
    mean = WeightMean(unique_tensors(model), 0.5)

    def step(number: int) -> None:
        model(torch.ones(2, 4)).sum().backward()
        optimizers[0].step()
        mean.update(number)

    step(1)
    taken = snapshot(model, optimizers, mean, rank=0)
    before = {part: {name: value.clone() for name, value in held.items()}
              for part, held in taken.items()}
    step(2)
    later = snapshot(model, optimizers, mean, rank=0)
    assert taken.keys() == {"model", "optimizer", "ema"}
    for part, held in taken.items():
        for name, value in held.items():
            assert torch.equal(value, before[part][name]), (part, name)
            assert not torch.equal(value, later[part][name]), (part, name)


def test_steps_done_again_from_the_start_are_shown_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    store = Store(str(tmp_path))
    for value in (1.0, 2.0):
        curve = Curve(store, "run", 0)
        curve.add(1, {"loss": value})
        curve.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0)]


def test_a_run_keeps_the_precision_that_it_measured_when_it_began(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    auto = dataclasses.replace(CONFIG, precision="auto")
    monkeypatch.setattr("tasks.parallel.fast_bf16", lambda device: False)
    killed(store, 7, auto)
    monkeypatch.setattr("tasks.parallel.fast_bf16", lambda device: True)
    resumed = Trainer(store, "run", Regression(), auto).fit().model
    whole = Trainer(store, "whole", Regression(), CONFIG).fit().model
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert Checkpoints(store, "run").newest()[1]["products"] == "fp32"


def test_sigterm_in_the_last_step_is_handed_on_after_the_last_checkpoint(tmp_path, sigterm):
    store = Store(str(tmp_path))
    with pytest.raises(Stopped, match="stopped at step 12 of 12"):
        Trainer(store, "run", Regression(), CONFIG).fit(
            lambda step, *_: signal.raise_signal(signal.SIGTERM) if step == 12 else None)
    assert sigterm == [True]
    assert Checkpoints(store, "run").steps()[-1] == 12
    assert Trainer(store, "run", Regression(), CONFIG).fit().steps == 12


def test_sigterm_while_workers_end_is_handed_on(tmp_path, monkeypatch, sigterm):
    store = Store(str(tmp_path))

    def fit() -> None:
        store.write_json(f"run/{RESULT}", {})
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("tasks.distributed._scaling", lambda *_: None)
    monkeypatch.setattr("ray.train.torch.TorchTrainer",
                        lambda *_, **__: types.SimpleNamespace(fit=fit))
    with pytest.raises(Stopped):
        fit_distributed(store, "run", Linear(), CONFIG, num_workers=2)
    assert sigterm == [True]


def test_workers_whose_run_is_taken_over_end_for_good_and_their_driver_says_why(
    tmp_path, monkeypatch
):
    store = Store(str(tmp_path))

    def workers(worker, train_loop_config, **_):
        joined = train_loop_config | {"task": Joined(store, at=8)}
        return types.SimpleNamespace(fit=lambda: worker(joined))

    monkeypatch.setattr("tasks.distributed._scaling", lambda *_: None)
    monkeypatch.setattr("ray.train.torch.TorchTrainer", workers)
    monkeypatch.setattr("ray.train.get_context", lambda: types.SimpleNamespace(
        get_world_rank=lambda: 0, get_world_size=lambda: 1))
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: None, raising=False)
    with pytest.raises(TakenOver, match="this one ends"):
        fit_distributed(store, "run", Linear(), CONFIG, num_workers=2)
    assert Checkpoints(store, "run").newest()[1]["step"] == CONFIG.steps


class Uneven(Linear):
    """A loss over the samples that have a target: one of four in the first half of a batch, all in
    the second."""

    def build_model(self) -> nn.Module:
        return nn.Linear(4, 1, bias=False)

    def loss(self, model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, dict]:
        here = batch[:, 0] > 0
        return (model(batch)[:, 0] * here).sum() / here.sum().clamp(min=1), {}

    def batch(self, step: int, rank: int, world: int) -> torch.Tensor:
        x = torch.arange(32.0).view(8, 4) + 1
        x[[2, 4, 6], 0] = -1
        return x[rank::world]


def test_the_loss_of_a_step_is_the_mean_of_those_of_its_parts(tmp_path):
    """Whatever number of tokens each holds: as over workers, so that parts can be split anew."""
    config = dataclasses.replace(CONFIG, steps=1, accumulate=2, clip_norm=0.0)
    task, seen = Uneven(), []
    Trainer(Store(str(tmp_path)), "run", task, config).fit(
        lambda step, steps, metrics: seen.append(metrics["loss"]))
    torch.manual_seed(config.seed)
    model = task.build_model()
    whole, *parts = (task.loss(model, task.batch(0, rank, world))[0].item()
                     for rank, world in ((0, 1), (0, 2), (1, 2)))
    assert seen == [pytest.approx(sum(parts) / 2)]
    assert seen != [pytest.approx(whole)]
