"""Contracts of sharded training on two gloo workers without Ray."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from infra.manifest import load_manifest
from infra.store import Store
from models.fourm.checkpoint import load_stored
from models.fourm.model import FourM
from tasks.finetune import modality_of
from tasks.frozen import held_rows, hold_rows
from tasks.parallel import blocks, restore_forwards, spread
from tasks.run_store import Checkpoints, read_curve
from tasks.task import Task
from tasks.train import FourMTask, train_fourm
from tasks.train_config import TrainConfig
from tasks.trainer import Trainer
from tests.models.token_set import make_set
from tests.tasks.test_finetune import BASE, MORE, released

CONFIG = TrainConfig(
    steps=6, batch_size=8, lr=1e-2, warmup_steps=2, precision="fp32", log_every=1,
    checkpoint_seconds=0.0, parallel="fsdp", ema_decay=0.9, accumulate=2, recompute=True,
)

# Rows of shared tables and whole tensors stay; the rest is trained, sharded, and averaged.
FROZEN = dataclasses.replace(
    MORE, freeze=("encoder.*", "*.caption.*", "*_embeddings.tok_rgb@32.*"),
    training=dataclasses.replace(BASE.training, parallel="fsdp", ema_decay=0.5,
                                 finish_with_ema=True, weight_decay=0.5),
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()).reshape(1))
        self.linear = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * torch.tanh(self.linear(x))


class Stack(nn.Module):
    """Odd widths, and a vector that one of two workers holds alone."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(4, 5)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.out = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x)
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


class Fit(Task):
    """Learns y = 2x; may stop like a killed process."""

    def __init__(self, die_at: int | None = None) -> None:
        self.die_at = die_at

    def build_model(self) -> nn.Module:
        return Stack()

    def batch(self, step: int, rank: int, world: int) -> torch.Tensor:
        if step == self.die_at:
            raise KeyError("killed")
        return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))[rank::world]

    def loss(self, model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, dict]:
        return (model(batch) - 2 * batch).square().mean(), {}

    def is_hidden(self, name: str) -> bool:
        return name.startswith("layers.")

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        x = torch.ones(2, 4)
        return {"val": float((model(x) - 2 * x).square().mean())}


def _work(rank: int, root: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2
    )
    store = Store(root)
    Trainer(store, "whole", Fit(), CONFIG, rank=rank, world=2).fit()
    for task in (Fit(die_at=4), Fit()):
        try:
            Trainer(store, "cut", task, CONFIG, rank=rank, world=2).fit()
        except KeyError:
            assert task.die_at
    half = dataclasses.replace(CONFIG, precision="bf16", steps=2)
    Trainer(store, "half", Fit(), half, rank=rank, world=2).fit()
    task = FourMTask(store, load_manifest(store, "set"), FROZEN)
    Trainer(store, "frozen", task, FROZEN.training, rank=rank, world=2).fit()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Store:
    root = tmp_path_factory.mktemp("sharded")
    train_fourm(*make_set(str(root)), BASE, run="base")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(rank, str(root))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(600)
    assert [worker.exitcode for worker in workers] == [0, 0]
    return Store(str(root))


@pytest.mark.slow
def test_shards_train_what_one_process_trains(trained, tmp_path):
    alone = dataclasses.replace(CONFIG, parallel="ddp", accumulate=4, recompute=False)
    one_store = Store(str(tmp_path))
    one = Trainer(one_store, "one", Fit(), alone).fit()
    kept, state = Checkpoints(trained, "whole").newest()
    single, _ = Checkpoints(one_store, "one").newest()
    assert len(state["sha256"]) == 6  # three groups of tensors, each in two parts
    ours, alone_losses = ([line["loss"] for line in read_curve(store, run) if "grad_norm" in line]
                          for store, run in ((trained, "whole"), (one_store, "one")))
    assert ours == pytest.approx(alone_losses, abs=2e-3)  # of both workers' samples
    for group in ("model", "ema"):
        assert kept[group].keys() == dict(one.model.named_parameters()).keys()
        for name, value in single[group].items():
            assert torch.allclose(value, kept[group][name], atol=2e-3), (group, name)


@pytest.mark.slow
def test_shards_resume_to_the_same_bits(trained):
    whole, cut = (Checkpoints(trained, name).newest()[0] for name in ("whole", "cut"))
    for group, tensors in whole.items():
        for name, value in tensors.items():
            assert torch.equal(value, cut[group][name]), (group, name)


@pytest.mark.slow
def test_one_process_goes_on_from_the_shards_of_two(trained):
    wanted, _ = Checkpoints(trained, "whole").newest()
    steps = Checkpoints(trained, "cut").steps()
    trained.delete(f"cut/checkpoints/step-{steps[-1]:08d}/state.json")
    assert Checkpoints(trained, "cut").steps() == [steps[-2]]
    alone = dataclasses.replace(CONFIG, parallel="ddp", accumulate=4, recompute=False)
    model = Trainer(trained, "cut", Fit(), alone).fit().model
    for name, value in model.named_parameters():
        assert torch.allclose(value, wanted["model"][name], atol=2e-3), name


@pytest.mark.slow
def test_bf16_shards_keep_fp32_weights(trained):
    tensors, _ = Checkpoints(trained, "half").newest()
    assert {value.dtype for value in tensors["model"].values()} == {torch.float32}
    assert all(torch.isfinite(value).all() for value in tensors["model"].values())


@pytest.mark.slow
def test_frozen_rows_of_sharded_tables_stay_bit_for_bit_while_others_learn(trained, tmp_path):
    task = FourMTask(trained, load_manifest(trained, "set"), FROZEN)
    model = task.build_model()
    model.load_state_dict(Checkpoints(trained, "frozen").newest()[0]["model"], strict=False)
    before, after = released(load_stored(trained, "runs/base/model")), released(model)
    moved = set()
    for name, value in before.items():
        if name.startswith("encoder.") or modality_of(name) in ("caption", "tok_rgb@32"):
            assert torch.equal(after[name], value), name
        elif not torch.equal(after[name], value):
            moved.add(name)
    assert {"decoder.0.mlp.fc1.weight", "decoder_norm.weight"} <= moved
    alone = Trainer(Store(str(tmp_path)), "one", task, dataclasses.replace(
        FROZEN.training, parallel="ddp", accumulate=2)).fit().model
    for name, value in released(alone).items():
        assert torch.allclose(after[name], value, atol=2e-3), name


def test_held_rows_outlast_gradients_that_are_not_finite_and_updates():
    model = nn.Linear(3, 5)
    hold_rows(model, "weight", torch.tensor([1, 4]))
    before, (held,) = model.weight.detach().clone(), held_rows(model)
    model.weight.grad = torch.full_like(model.weight, float("nan"))
    held.clear_gradient()
    assert torch.isfinite(model.weight.grad).all(1).tolist() == [False, True, False, False, True]
    with torch.no_grad():
        model.weight += 1
    held.put_back()
    moved = (model.weight != before).all(1)
    assert moved.tolist() == [True, False, True, True, False]


def test_blocks_are_the_outermost_members_of_module_lists():
    model = Stack()
    assert blocks(model) == list(model.layers)


def test_recomputed_blocks_have_the_gradients_of_kept_ones():
    torch.manual_seed(0)
    model, x = Stack(), torch.randn(3, 4)
    model(x).sum().backward()
    kept = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    spread(model, CONFIG, 1, bf16=False)
    model(x).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(kept, model.parameters(), strict=True))
    restore_forwards(model)
    assert all("forward" not in layer.__dict__ for layer in model.layers)


def test_recomputation_needs_blocks():
    with pytest.raises(ValueError, match="no module lists"):
        spread(nn.Linear(2, 2), CONFIG, 1, bf16=False)


def test_blocks_of_a_kind_are_compiled_once_whatever_their_number(monkeypatch):
    from tests.models.test_fourm_compile import CONFIG as NETWORK
    from tests.models.test_fourm_compile import make_batch

    counter = CompileCounter()
    compile_with = functools.partial(torch.compile, backend=counter, fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile_with)
    model = FourM(dataclasses.replace(NETWORK, encoder_depth=3, decoder_depth=3))
    wanted = [model(make_batch(seed)).total for seed in range(3)]
    config = dataclasses.replace(CONFIG, compile=True, recompute=False)
    spread(model, config, 1, bf16=False)
    for seed, expected in enumerate(wanted):
        found = model(make_batch(seed)).total
        found.backward()
        assert torch.allclose(found, expected, atol=1e-6)
    assert counter.frame_count == 2


def test_compiled_training_without_a_compiler_is_refused_by_name(tmp_path: Path, monkeypatch):
    import torch._inductor.cpp_builder as builder

    def missing() -> str:
        raise RuntimeError("no g++")

    monkeypatch.setattr(builder, "get_cpp_compiler", missing)
    config = dataclasses.replace(CONFIG, compile=True)
    with pytest.raises(ValueError, match=r"no compiler for cpu \(no g\+\+\).*compile=False"):
        Trainer(Store(str(tmp_path)), "run", Fit(), config).fit()
