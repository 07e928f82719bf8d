"""Contracts of the one trainer, on a two-layer network and a file store."""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
import time
import types

import pytest
import torch
from torch import nn

from infra.store import Store
from tasks.distributed import RESULT, STOP, _told, _worker, fit_distributed
from tasks.flops import Load, peak_flops
from tasks.meter import Meter
from tasks.preemption import Stopped
from tasks.run_store import Checkpoints, Curve, read_curve
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


class Linear(Regression):
    """Without dropout, whose draws depend on the rank."""

    def build_model(self) -> nn.Module:
        return nn.Linear(4, 4)


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


def test_a_run_that_began_with_other_random_streams_is_refused(tmp_path):
    store, later = Store(str(tmp_path)), Regression()
    with pytest.raises(KeyError, match="killed"):
        Trainer(store, "cut", Regression(die_at=7), CONFIG).fit()
    later.streams = 2
    with pytest.raises(ValueError, match="with random streams 1, this release with 2"):
        Trainer(store, "cut", later, CONFIG).fit()


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


def test_evaluation_sees_neither_dropout_nor_gradients_and_training_goes_on_with_both(tmp_path):
    modes: list[tuple[bool, bool]] = []

    class Watched(Regression):
        def loss(self, model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, dict]:
            modes.append((model.training, torch.is_grad_enabled()))
            return super().loss(model, batch)

        def evaluate(self, model: nn.Module) -> dict[str, float]:
            modes.append((model.training, torch.is_grad_enabled()))
            return {"val": 0.0}

    config = dataclasses.replace(CONFIG, steps=3, warmup_steps=0, eval_every=1)
    Trainer(Store(str(tmp_path)), "run", Watched(), config).fit()
    assert modes == [(True, True), (False, False)] * 3


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


def test_accumulated_parts_add_up_to_the_gradient_of_the_batch(tmp_path):
    store = Store(str(tmp_path))
    whole, parts = (
        Trainer(store, f"{parts}", Linear(), dataclasses.replace(CONFIG, accumulate=parts)).fit()
        for parts in (1, 4)
    )
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(value, parts.model.state_dict()[name], atol=1e-6)
    # Adam would hide a factor, clipping would not.
    assert parts.metrics["grad_norm"] == pytest.approx(whole.metrics["grad_norm"], rel=1e-4)


def test_a_batch_that_does_not_divide_into_parts_is_refused(tmp_path):
    odd = dataclasses.replace(CONFIG, accumulate=3)
    with pytest.raises(ValueError, match="batch_size 8 is no multiple of 1 workers x 3"):
        Trainer(Store(str(tmp_path)), "run", Linear(), odd)


def test_a_broken_batch_is_skipped_on_the_device_as_on_the_host(tmp_path):
    """AdamW alone skips in its kernel, with Muon the host decides: both leave the step out."""
    class AdamWOnly(Regression):
        def is_hidden(self, name: str) -> bool:
            return False

    store = Store(str(tmp_path))
    one = dataclasses.replace(CONFIG, steps=1)
    start = torch.nn.utils.parameters_to_vector(_fresh(one).parameters())
    for name, kind in (("device", AdamWOnly), ("host", Regression)):
        result = Trainer(store, name, kind(broken_at=0), one).fit()
        assert result.skipped == 1
        assert torch.equal(torch.nn.utils.parameters_to_vector(result.model.parameters()), start)


def _fresh(config: TrainConfig) -> nn.Module:
    torch.manual_seed(config.seed)
    return Regression().build_model()


def test_the_mean_of_the_weights_is_kept_resumed_and_finished_with(tmp_path):
    store = Store(str(tmp_path))
    config = dataclasses.replace(CONFIG, ema_decay=0.9)
    Trainer(store, "whole", Regression(), config).fit()
    with pytest.raises(KeyError, match="killed"):
        Trainer(store, "cut", Regression(die_at=5), config).fit()
    Trainer(store, "cut", Regression(), config).fit()
    whole, cut = (Checkpoints(store, name).newest()[0] for name in ("whole", "cut"))
    assert whole["ema"].keys() == whole["model"].keys()
    for name, value in whole["ema"].items():
        assert torch.equal(value, cut["ema"][name])
        assert not torch.equal(value, whole["model"][name])
    final = dataclasses.replace(config, finish_with_ema=True)
    model = Trainer(store, "final", Regression(), final).fit().model
    for name, value in model.named_parameters():
        assert torch.equal(value, whole["ema"][name])


class Counted(Regression):
    """Its batches hold eight tokens."""

    def load(self, batch: torch.Tensor) -> Load:
        return Load({"x": 5}, slots=8, flops=1e6)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_schedule_in_tokens_is_that_in_steps_of_as_many_tokens(tmp_path, schedule):
    rates = []
    for name, lengths in (("steps", {"steps": 6, "warmup_steps": 2}),
                          ("tokens", {"steps": 99, "tokens": 48, "warmup_tokens": 16})):
        config = dataclasses.replace(CONFIG, schedule=schedule, log_every=1, **lengths)
        store, seen = Store(str(tmp_path)), []
        result = Trainer(store, name, Counted(), config).fit(
            lambda step, steps, metrics, seen=seen: seen.append(metrics["lr"]))
        assert result.steps == len(seen) == 6
        rates.append(seen)
    assert rates[0] == pytest.approx(rates[1])


def test_a_schedule_in_tokens_needs_a_task_that_counts_them(tmp_path):
    config = dataclasses.replace(CONFIG, tokens=48)
    with pytest.raises(ValueError, match="batches of Linear hold no tokens"):
        Trainer(Store(str(tmp_path)), "run", Linear(), config).fit()


def test_rates_of_tokens_and_utilisation_are_points_of_the_curve(tmp_path):
    store = Store(str(tmp_path))
    Trainer(store, "run", Counted(), CONFIG).fit()
    line = read_curve(store, "run")[0]
    assert line["tokens_per_second"] == line["tokens_per_second/x"] > 0
    # 8 samples and 3e6 operations a step.
    peak = peak_flops(torch.device("cpu"), "fp32")
    assert line["mfu"] == pytest.approx(3e6 * line["samples_per_second"] / 8 / peak)


@pytest.mark.parametrize(("name", "tflops"), [
    ("NVIDIA L4", 121), ("NVIDIA L40", 0), ("NVIDIA L40S", 362), ("NVIDIA A10", 125),
    ("NVIDIA A10G", 70), ("NVIDIA RTX A1000 Laptop GPU", 0), ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA GH200 480GB", 989),
])  # fmt: skip
def test_the_peak_of_a_gpu_is_that_of_its_own_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "bf16") == tflops * 1e12


def test_points_are_means_over_the_steps_and_samples_of_all_workers():
    def everyone(own):
        return [own, [{"loss": 9.0, "loss/b": 4.0}, {"loss": 2, "loss/b": 1}, {"x": 5}, 30.0]]

    meter = Meter(lambda: 1e9, everyone)
    meter.add({"loss": torch.tensor(1.0)}, 8, [Load({"x": 2, "y": 1}, 4, 5.0)])
    meter.add({"loss": torch.tensor(2.0), "loss/a": torch.tensor(3.0)}, 8)
    found = meter.take()
    assert (found["loss"], found["loss/a"], found["loss/b"]) == (3.0, 3.0, 4.0)
    shares = [found[f"tokens_per_second/{name}"] / found["tokens_per_second"] for name in "xy"]
    assert shares == pytest.approx([7 / 8, 1 / 8])
    assert found["mfu"] / found["samples_per_second"] == pytest.approx(45 / 16 / 2 / 1e9)


def test_tensorboard_gets_every_point_and_what_it_measures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Trainer(Store(str(tmp_path)), "run", Counted(), CONFIG).fit()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"loss", "error", "lr", "grad_norm", "mfu", "samples_per_second",
            "tokens_per_second", "tokens_per_second/x"} <= set(tags)
    assert [event.step for event in events.Scalars("lr")] == [2, 4, 6, 8, 10, 12]


def test_steps_that_are_done_again_after_a_crash_are_shown_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    store = Store(str(tmp_path))
    for begun, steps in ((0, (2, 4, 6)), (2, (4, 6, 8))):
        curve = Curve(store, "run", begun)
        for step in steps:
            curve.add(step, {"loss": float(begun)})
        curve.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] \
        == [(2, 0.0), (4, 2.0), (6, 2.0), (8, 2.0)]
    assert [line["step"] for line in read_curve(store, "run")] == [2, 4, 6, 8]


@pytest.mark.parametrize(("field", "wrong"), [
    ("ema_decay", 1.0), ("accumulate", 0), ("parallel", "zero"), ("clip_norm", -1.0),
    ("warmup_steps", -1), ("min_lr_ratio", 1.5), ("eval_every", -5),
])
def test_settings_of_the_layout_are_checked(field, wrong):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(CONFIG, **{field: wrong})


def test_sigterm_ends_after_a_checkpoint_and_reaches_the_handler_before(tmp_path):
    store, heard = Store(str(tmp_path)), []
    config = dataclasses.replace(CONFIG, checkpoint_seconds=1e6)
    previous = signal.signal(signal.SIGTERM, lambda *_: heard.append(Checkpoints(
        store, "run").steps()))
    try:
        with pytest.raises(Stopped, match=r"stopped at step \d+ of 12"):
            Trainer(store, "run", Regression(), config).fit(
                lambda step, *_: signal.raise_signal(signal.SIGTERM) if step == 4 else None)
        assert heard == [[4]]
    finally:
        signal.signal(signal.SIGTERM, previous)
    resumed = Trainer(store, "run", Regression(), config).fit().model
    whole = Trainer(store, "whole", Regression(), config).fit().model
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_sigterm_of_the_driver_ends_its_workers_after_a_checkpoint(tmp_path):
    store, config = Store(str(tmp_path)), dataclasses.replace(CONFIG, checkpoint_seconds=1e6)
    heard = types.SimpleNamespace(requested=True)
    with _told(store, "run", heard):
        deadline = time.monotonic() + 60
        while not store.exists(f"run/{STOP}"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    with pytest.raises(Stopped):
        Trainer(store, "run", Regression(), config,
                asked=lambda: (False, store.exists(f"run/{STOP}"))).fit()
    assert Checkpoints(store, "run").steps() == [2]


def test_workers_that_cannot_share_a_batch_are_refused_before_any_starts(tmp_path):
    with pytest.raises(ValueError, match="batch_size 8 is no multiple of 3 workers x 1"):
        fit_distributed(Store(str(tmp_path)), "run", Regression(), CONFIG, num_workers=3)


def test_a_worker_whose_node_is_about_to_go_keeps_one_checkpoint_at_once(tmp_path, monkeypatch):
    import ray.train

    context = types.SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    told = iter([None, "soon"])
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: next(told, "soon"),
                        raising=False)
    store, config = Store(str(tmp_path)), dataclasses.replace(CONFIG, checkpoint_seconds=1e6)
    _worker({"store": store, "path": "run", "task": Regression(), "config": config})
    assert Checkpoints(store, "run").steps() == [4, 12]
    assert store.read_json(f"run/{RESULT}")["steps"] == 12


def test_a_checkpoint_is_written_while_training_goes_on(tmp_path):
    """A store that takes long to write delays no step but that of the next checkpoint."""
    class Slow(Store):
        def write(self, path: str, data: bytes) -> None:
            if path.endswith("model.safetensors"):
                assert free.wait(600)
            super().write(path, data)

    free, store = threading.Event(), Slow(str(tmp_path))
    config = dataclasses.replace(CONFIG, steps=6, checkpoint_seconds=1e6, log_every=1)
    asked = iter([(True, False)])

    def report(step: int, *_: object) -> None:
        if step == 5:
            assert Checkpoints(store, "run").steps() == []
            free.set()

    Trainer(store, "run", Regression(), config,
            asked=lambda: next(asked, (False, False))).fit(report)
    assert Checkpoints(store, "run").steps() == [1, 6]


def test_what_a_killed_run_left_half_written_is_swept(tmp_path):
    store = Store(str(tmp_path))
    store.write("run/checkpoints/step-00000003/model.safetensors", b"half")
    Trainer(store, "run", Regression(), CONFIG).fit()
    assert not store.list("run/checkpoints/step-00000003")


def test_a_checkpoint_in_parts_is_whole_for_any_number_of_workers(tmp_store):
    checkpoints, whole = Checkpoints(tmp_store, "run"), torch.arange(15.0).view(5, 3)
    parts = [*whole.chunk(4), whole[:0]][:4]  # 2 + 2 + 1 + 0 rows
    for rank in (3, 2, 1, 0):
        tensors = {"model": {"w": parts[rank]} | ({} if rank else {"step": torch.tensor(7.0)})}
        assert checkpoints.steps() == []
        checkpoints.save(2, tensors, {}, rank=rank, world=4)
    tensors, state = checkpoints.newest()
    assert torch.equal(tensors["model"]["w"], whole)
    assert tensors["model"]["step"] == 7
    assert state["step"] == 2


def test_weights_and_biases_gets_the_curve_or_is_asked_for_by_name(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, wandb="pictures")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb='pictures' needs the package wandb"):
        Trainer(Store(str(tmp_path)), "run", Regression(), config)
    logged, module = [], types.ModuleType("wandb")
    module.init = lambda **options: types.SimpleNamespace(
        log=lambda metrics, step: logged.append((options["project"], step)), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    Trainer(Store(str(tmp_path)), "run", Regression(), config).fit()
    assert logged[0] == ("pictures", 2)
