"""A stand-in for a GPU: tensors of the CPU that say they lie on "cuda" and refuse to meet others.

    with gpu():
        model = moved(network)              # its tensors lie on the GPU now
        model(batch.to("cuda"))             # raises if a tensor was left on the CPU

What is computed is real, so it can be compared with what the CPU computes. `READS` counts how often
the host has waited for numbers of the GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

GPU = torch.device("cuda:0")
READS: Counter[str] = Counter()
_ATEN = torch.ops.aten
_READ = (_ATEN._local_scalar_dense, _ATEN.equal, _ATEN.nonzero, _ATEN.bincount)
_MOVING = (_ATEN._to_copy, _ATEN.copy_, _ATEN._foreach_copy_)
_INDEXING = (_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._index_put_impl_)


_PRODUCTS = {
    nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__,
    torch.bmm, Tensor.bmm, torch.mm, Tensor.mm, torch.einsum, torch.addmm, torch.baddbmm,
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose2d,
}  # fmt: skip
"""What autocast computes in half precision; it does not look at these tensors by itself."""
_WIDE = {nn.functional.layer_norm, torch.layer_norm, torch.softmax, Tensor.softmax, Tensor.pow,
         nn.functional.softmax, nn.functional.cross_entropy, torch.cumsum, Tensor.cumsum}
"""What it computes in fp32 on a GPU."""
_WIDEST = {nn.functional.grid_sample, torch.grid_sampler, torch.atan2, torch.cross}
"""What it computes in the widest type that it is given."""


class OnGPU(Tensor):
    """A tensor of the GPU; `inner` holds its numbers."""

    inner: Tensor
    is_cuda, is_cpu, is_meta = True, False, False
    device = GPU
    data = property(Tensor.detach)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGPU:
        with _disable_current_modes():
            # To C++ it is one of the meta device, of which autograd asks no driver.
            shell = torch.empty_strided(
                inner.shape, inner.stride(), dtype=inner.dtype, device="meta"
            )
            made = Tensor._make_subclass(cls, shell, False, device_for_backend_keys=GPU)
        made.inner = inner.detach()
        return made

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the numbers behind its arguments, none of which may lie on the CPU."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = {id(leaf.inner): leaf for leaf in leaves if isinstance(leaf, OnGPU)}
    packet = func.overloadpacket
    if there and packet not in _MOVING:
        _refuse_strangers(func, args, leaves)
    READS[packet.__name__] += bool(there) and packet in _READ
    named, onto = dict(kwargs), kwargs.get("device")
    kind = torch.device(onto).type if onto is not None else ""
    # C++ asks for the meta device where it makes something beside a tensor of the GPU.
    named |= {"device": "cpu"} if kind in ("cuda", "meta") else {}
    args, named = tree_map_only(OnGPU, lambda leaf: leaf.inner, (args, named))
    found = func(*args, **named)
    stays = kind != "cpu" and not (packet is _ATEN.copy_ and id(args[0]) not in there)
    if not (stays and (there or kind)):
        return found
    return tree_map_only(
        Tensor, lambda each: there[id(each)] if id(each) in there else OnGPU(each), found
    )


def _refuse_strangers(func: Any, args: Any, leaves: list[Tensor]) -> None:
    """Numbers alone may come from the CPU, and indices of what lies on the GPU."""
    strangers = [leaf for leaf in leaves if not isinstance(leaf, OnGPU) and leaf.dim()]
    if func.overloadpacket in _INDEXING and isinstance(args[0], OnGPU):
        strangers = [leaf for leaf in tree_leaves(args[2:3]) if any(leaf is s for s in strangers)]
    if strangers:
        raise RuntimeError(f"{func}: tensors of cuda:0 and of the CPU meet: "
                           f"{[(tuple(leaf.shape), str(leaf.device)) for leaf in leaves]}")


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """What would ask for a driver before it becomes an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.to:
            return _to(*args, **kwargs)
        own = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, OnGPU)]
        onto = kwargs.get("device")
        if onto is not None and torch.device(onto).type == "cuda":
            del kwargs["device"]
            return func(*args, **kwargs) if own else OnGPU(func(*args, **kwargs))
        if not own:
            return func(*args, **kwargs)
        if func is Tensor.cpu:
            return _to(args[0], "cpu")
        if func is Tensor.tolist:
            READS["tolist"] += 1
            return args[0].inner.tolist()
        if func is Tensor.new_tensor:
            return OnGPU(args[0].inner.new_tensor(*args[1:], **kwargs))
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], _indices(args[1]), *args[2:])
        args, kwargs = _autocast(func, args, kwargs)
        if func is nn.functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _to(x: Tensor, *how: Any, copy: bool = False, **named: Any) -> Tensor:
    other = how[0] if how and isinstance(how[0], Tensor) else named.pop("other", None)
    if other is not None:
        device, kind = other.device, other.dtype
    else:
        device, kind, _, _ = torch._C._nn._parse_to(*how, **named)
    if isinstance(x, OnGPU) and device is not None and device.type == "cpu":
        READS["cpu"] += 1
        return x.inner.to(kind or x.dtype, copy=True)
    if not isinstance(x, OnGPU) and device is not None and device.type == "cuda":
        return OnGPU(x.to(kind or x.dtype, copy=True))
    if isinstance(x, OnGPU):  # C++ calls its place the meta device
        return x.to(kind or x.dtype, copy=copy)
    return x.to(*how, copy=copy, **named)


def _autocast(func: Any, args: Any, kwargs: Any) -> Any:
    if not torch.is_autocast_enabled("cuda") or func not in _PRODUCTS | _WIDE | _WIDEST:
        return args, kwargs
    kind = torch.get_autocast_dtype("cuda") if func in _PRODUCTS else torch.float32
    return tree_map_only(OnGPU, lambda x: x.to(kind) if x.is_floating_point() else x,
                         (args, kwargs))  # fmt: skip


def _indices(index: Any) -> Any:
    """Lists of numbers as tensors, as else C++ would put them on the meta device."""
    several = index if isinstance(index, tuple) else (index,)
    several = tuple(torch.tensor(each) if isinstance(each, list) else each for each in several)
    return several if isinstance(index, tuple) else several[0]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:
    """Written out, as torch would ask the driver which kernel there is."""
    if torch.is_autocast_enabled("cuda"):
        kind = torch.get_autocast_dtype("cuda")
        q, k, v = (each.to(kind) for each in (q, k, v))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(kind)
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, q.dtype):
        raise RuntimeError(f"a mask of {attn_mask.dtype} for queries of {q.dtype}")
    score = q @ k.transpose(-2, -1) * (scale or q.shape[-1] ** -0.5)
    if is_causal:
        attn_mask = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        score = score.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        score = score + attn_mask
    return score.softmax(-1).to(q.dtype) @ v


def moved(model: nn.Module) -> nn.Module:
    """A network with its parameters and buffers on the GPU, in place."""
    known: dict[int, Tensor] = {}

    def there(value: Tensor | None) -> Any:
        if value is None or isinstance(value, OnGPU):
            return value
        if id(value) not in known:
            copy: Tensor = OnGPU(value.detach().clone())
            known[id(value)] = nn.Parameter(copy, value.requires_grad) \
                if isinstance(value, nn.Parameter) else copy
        return known[id(value)]

    for part in model.modules():
        for group in (part._parameters, part._buffers):
            group.update({name: there(value) for name, value in group.items()})
    return model


@contextmanager
def gpu() -> Iterator[None]:
    """Within it there is a GPU, as far as torch can be told so."""
    own = nn.Module.to

    def to(model: nn.Module, *how: Any, **named: Any) -> nn.Module:
        device = torch._C._nn._parse_to(*how, **named)[0]
        there = device is not None and device.type == "cuda"
        return moved(model) if there else own(model, *how, **named)

    READS.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "to", to)
        for name, value in {
            "is_available": True, "is_bf16_supported": True, "device_count": 1,
            "is_current_stream_capturing": False, "get_device_name": "NVIDIA H100 80GB HBM3",
            "is_initialized": False, "manual_seed_all": None,
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, lambda *_, found=value, **__: found)
        # A step asks the driver whether it is being recorded.
        patch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check",
                      lambda optimizer: None)  # fmt: skip
        # Views of it would need what only a tensor of C++ has.
        patch.setattr(torch, "inference_mode", torch.no_grad)
        with _Operations(), _Calls():
            yield


def on_cpu(value: Any) -> Any:
    """What lies on the GPU, in whatever containers, as tensors of the CPU."""
    return tree_map(lambda leaf: leaf.inner if isinstance(leaf, OnGPU) else leaf, value)
