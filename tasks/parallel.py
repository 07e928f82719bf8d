"""How one network is spread over workers and computed: DDP or FSDP2, recomputation, compilation.

What is treated as a unit is a block: a member of the network's module lists. FSDP2 gathers the
weights of one block at a time; embeddings and heads stay with the root, in fp32. Under bf16 a
block's weights travel as bf16 and gradients are summed in fp32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from infra.machine import fast_bf16

if TYPE_CHECKING:
    import torch
    from torch import nn

    from infra.machine import Products
    from tasks.train_config import TrainConfig


def blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost members of the module lists of a network."""
    from torch import nn

    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks(child)
    return found


def spread(model: nn.Module, config: TrainConfig, world: int, *, bf16: bool) -> nn.Module:
    """The network to call: `model` itself, its DDP wrapper, or `model` with its tensors sharded in
    place. Build optimizers after it. Undo what it put into forwards with `restore_forwards`."""
    import torch

    parts = blocks(model)
    if config.recompute and not parts:
        raise ValueError("recompute=True finds no blocks: this network has no module lists")
    if config.compile:
        for part in parts or [model]:
            part.__dict__["forward"] = torch.compile(part.forward)
    if config.recompute:
        for part in parts:
            part.__dict__["forward"] = _recomputed(part.forward)
    if world == 1:
        return model
    if config.parallel == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    _shard(model, parts, world, bf16)
    return model


def reshard(model: nn.Module) -> None:
    """Gives back what a forward pass without a backward pass has left gathered at the root."""
    call = getattr(model, "reshard", None)
    if call is not None:
        call()


def restore_forwards(model: nn.Module) -> None:
    """Takes compilation and recomputation off a network."""
    for part in [model, *blocks(model)]:
        part.__dict__.pop("forward", None)


@contextmanager
def last_of(wrapped: nn.Module, last: bool) -> Iterator[None]:
    """Workers exchange gradients after the last part of an accumulated batch only."""
    no_sync: Callable[[], AbstractContextManager[Any]] | None = getattr(wrapped, "no_sync", None)
    set_sync = getattr(wrapped, "set_requires_gradient_sync", None)
    if set_sync is not None:
        set_sync(last)
    with no_sync() if no_sync is not None and not last else nullcontext():
        yield


def local(value: torch.Tensor) -> torch.Tensor:
    """This worker's part of a sharded tensor, or the tensor itself; detached, not copied."""
    value = value.detach()
    return value.to_local() if is_sharded(value) else value  # type: ignore[attr-defined]


def is_sharded(value: Any) -> bool:
    """Whether a tensor is spread over workers."""
    return hasattr(value, "device_mesh")


def cut_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The part of `whole` that belongs to this worker where `like` is sharded (on dimension 0)."""
    if not is_sharded(like):
        return whole
    mesh = like.device_mesh  # type: ignore[attr-defined]
    chunks = whole.chunk(mesh.size())
    rank = mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else whole[:0]


def shard_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`whole` spread over workers as `like` is; no worker sends anything."""
    if not is_sharded(like) or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import DTensor

    part = cut_like(whole, like).to(local(like).device).clone()
    return DTensor.from_local(
        part, like.device_mesh, like.placements,  # type: ignore[attr-defined]
        run_check=False, shape=whole.shape, stride=whole.stride(),
    )


def agree(flags: Iterable[bool], device: torch.device) -> list[bool]:
    """For each flag whether any worker has raised it; all workers call it alike."""
    import torch

    raised = torch.tensor([int(flag) for flag in flags], device=device)
    torch.distributed.all_reduce(raised, torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in raised.tolist()]


def everyone(own: Any, world: int, device: torch.device) -> list[Any]:
    """The JSON values of all workers in their order; all of them call it alike."""
    if world == 1:
        return [own]
    import torch

    text = torch.frombuffer(bytearray(json.dumps(own).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world)]
    torch.distributed.all_gather(sizes, torch.tensor([len(text)], device=device))
    longest = int(torch.cat(sizes).max())
    texts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in range(world)]
    padded = torch.nn.functional.pad(text, (0, longest - len(text)))
    torch.distributed.all_gather(texts, padded.to(device))
    return [json.loads(bytes(one[: int(size)].tolist()))
            for one, size in zip(texts, sizes, strict=True)]


def first_says(number: int, device: torch.device) -> int:
    """The first worker's `number`; all workers call it alike."""
    import torch

    said = torch.tensor([number], device=device)
    torch.distributed.broadcast(said, 0)
    return int(said)


def products_of(
    config: TrainConfig, begun: Products | None, world: int, device: torch.device
) -> Products:
    """What matrix products take in all parts of a run and on all of its workers, who call it alike.
    `begun` is what its checkpoint says. Where the configuration leaves it open, hardware is
    measured, once: another time or worker may come to another answer."""
    if config.precision != "auto":
        return config.precision
    if begun:
        return begun
    fast = int(fast_bf16(device.type))
    if world > 1:
        fast = first_says(fast, device)
    return "bf16" if fast else "fp32"


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def _shard(model: nn.Module, parts: list[nn.Module], world: int, bf16: bool) -> None:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (world,))
    # The residual stream stays fp32, as in autocast without shards.
    half = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=half if bf16 else MixedPrecisionPolicy())
    fully_shard(model, mesh=mesh)
