"""Weights, their mean and optimizer state as named tensors, and back.

What is saved is this worker's part where tensors are sharded; what is restored is whole, whoever
saved it, and cut to the worker's part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tasks.parallel import cut_like, is_sharded, local, shard_like
from tasks.train_config import FREE, TrainConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tasks.ema import WeightMean
    from tasks.run_store import Tensors
    from tasks.task import Task


def unique_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, each shared tensor once."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    kept = model.state_dict().keys()
    tensors.update({name: value for name, value in model.named_buffers() if name in kept})
    return tensors


def snapshot(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], mean: WeightMean | None, *,
    rank: int,
) -> Tensors:
    """Copies on the CPU of all that a checkpoint holds; what is not sharded only on rank 0."""
    own = unique_tensors(model)
    tensors: Tensors = {"model": _copies(own, rank), "optimizer": {}}
    for i, optimizer in enumerate(optimizers):
        named = {f"{i}.{index}.{key}": value
                 for index, state in optimizer.state_dict()["state"].items()
                 for key, value in state.items()}
        tensors["optimizer"] |= _copies(named, rank)
    if mean:
        tensors["ema"] = {name: value.to("cpu", copy=True) for name, value in mean.tensors.items()
                          if is_sharded(own[name]) or not rank}
    return tensors


def _copies(tensors: Mapping[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    return {name: local(value).to("cpu", copy=True) for name, value in tensors.items()
            if is_sharded(value) or not rank}


def restore_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Overwrites the weights of a network that is not spread yet."""
    import torch

    own = unique_tensors(model)
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)


def restore_rest(
    tensors: Tensors, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer],
    mean: WeightMean | None,
) -> None:
    """Restores optimizer state and, where it is kept, the mean of the weights."""
    for i, optimizer in enumerate(optimizers):
        order = [p for group in optimizer.param_groups for p in group["params"]]
        states: dict[int, dict[str, torch.Tensor]] = {}
        for index, key, value in _entries(tensors["optimizer"], i):
            states.setdefault(index, {})[key] = shard_like(value, order[index])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": states, "param_groups": groups})
    if mean:
        own = unique_tensors(model)
        for name, value in tensors["ema"].items():
            mean.tensors[name].copy_(cut_like(value, own[name]))


def _entries(
    tensors: Mapping[str, torch.Tensor], optimizer: int
) -> Iterator[tuple[int, str, torch.Tensor]]:
    for name, value in tensors.items():
        which, index, key = name.split(".", 2)
        if int(which) == optimizer:
            yield int(index), key, value


def check_same_run(
    path: str, config: TrainConfig, task: Task, model: nn.Module, tensors: Tensors,
    state: dict[str, Any],
) -> None:
    """Raises ValueError where the checkpoint of the run at `path` is that of another training."""
    begun = state.get("streams", 1)
    if begun != task.streams:
        raise ValueError(f"the run at {path} draws its batches with random streams {begun}, this "
                         f"release with {task.streams}; choose another run name, or finish it with "
                         "the release that began it")
    # Checkpoints of earlier releases do not tell.
    for name, value in task.identity().items():
        if (known := state.get("task", {}).get(name, value)) != value:
            older = f", or --manifest {known[0]}@{known[1]}" if name == "manifest" else ""
            raise ValueError(f"the run at {path} was started with another {name}"
                             f"{_apart(known, value)}; choose another run name{older}")
    for field in dataclasses.fields(config):
        if field.name in FREE:
            continue
        own = getattr(config, field.name)
        before = state["config"].get(field.name, field.default)
        if before != own and before != list(_as_sequence(own)):
            raise ValueError(
                f"the run at {path} was started with {field.name}={before}, now it is {own}; "
                "choose another run name or the old value"
            )
    names = unique_tensors(model).keys()
    if names != tensors["model"].keys():
        odd = sorted(names ^ tensors["model"].keys())[:3]
        raise ValueError(f"the run at {path} trains another model (it differs in {odd}); "
                         "choose another run name")


def _apart(before: Any, now: Any) -> str:
    """Where two JSON values first differ, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        name = next(k for k in sorted({*before, *now}) if before.get(k) != now.get(k))
        return f", {name}{_apart(before.get(name), now.get(name))}"
    return f": {before}, now {now}"


def _as_sequence(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else (value,)
