"""The one attention function and the masks it takes.

B batch, H heads, Q/K query and key positions, D head width. `scaled_dot_product_attention` picks
Flash kernels, but its CPU kernel is slow where AMX is fast: forward and backward for B 16, H 6,
N 128, D 64 take 42 ms in bf16 and 74 ms in fp32 with rounded products on one core, batched
products 7.4 and 12 ms (in exact fp32: 16 and 14 to 18).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

PADDING = -1
"""Modality id of an unused slot."""

Mask = Tensor | tuple[tuple[int, Tensor | None], ...] | None
"""An additive mask [B,1,Q or 1,K]; or, where several inputs lie behind one another, the slots of
each and its mask [B,1,1,slots], and every input attends itself alone. None hides nothing."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Scaled dot-product attention [B,H,Q,D]; zeros where there are no keys at all."""
    if isinstance(mask, tuple):
        return _by_input(q.split([slots for slots, _ in mask], 2), k, v, mask, 2)
    if not k.shape[2]:
        return torch.zeros_like(q)
    if q.device.type == "cpu" and (q.dtype == torch.bfloat16 or _rounded()):
        return _Products.apply(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """`attention` to keys of several inputs: the rows of q that attend each lie below one another,
    [inputs * B,H,Q,D], or are the same for all, [B,H,Q,D]."""
    rows = len(k) * len(mask) if isinstance(mask, tuple) else len(k)
    if len(q) != rows:
        q = q.repeat(rows // len(q), 1, 1, 1)
    if isinstance(mask, tuple):
        return _by_input(q.chunk(len(mask)), k, v, mask, 0)
    return attention(q, k, v, mask)


def _by_input(
    q: Sequence[Tensor], k: Tensor, v: Tensor, mask: tuple[tuple[int, Tensor | None], ...], dim: int
) -> Tensor:
    """What `q` of every input attend of its keys, together along `dim` of [B,H,Q,D]."""
    slots = [count for count, _ in mask]
    found = [attention(asking, keys, values, own) for asking, keys, values, (_, own) in
             zip(q, k.split(slots, 2), v.split(slots, 2), mask, strict=True)]
    # In memory heads lie inside slots, as projections take them.
    return torch.cat([each.transpose(1, 2) for each in found], min(dim, 1)).transpose(1, 2)


def _rounded() -> bool:
    """Whether products of fp32 may round their inputs, of which the CPU's Flash kernel takes no
    notice. The compiler cannot ask."""
    return not torch.compiler.is_compiling() and torch.get_float32_matmul_precision() != "highest"


class _Products(torch.autograd.Function):
    """Attention by batched products, which scale and add to the mask as they go; each input is
    laid out for them once for both passes."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        shape, scale = (*q.shape[:3], k.shape[2]), q.shape[-1] ** -0.5
        flat_q, flat_k, flat_v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        score = q.new_empty(shape)
        if mask is not None:
            score.copy_(mask)
        flat = score.view(-1, *shape[2:])
        flat.baddbmm_(flat_q, flat_k.transpose(1, 2), beta=float(mask is not None), alpha=scale)
        torch.softmax(flat, -1, out=flat)
        ctx.save_for_backward(flat_q, flat_k, flat_v, flat)
        ctx.shape, ctx.scale = shape, scale
        return torch.bmm(flat, flat_v).view(*shape[:3], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        grad = grad.reshape(-1, *grad.shape[2:])
        of_v = torch.bmm(weights.transpose(1, 2), grad)
        of_score = torch.bmm(grad, v.transpose(1, 2))  # of the weights as yet
        torch._softmax_backward_data(of_score, weights, -1, weights.dtype, grad_input=of_score)
        none, scaled = q.new_empty(1), {"beta": 0.0, "alpha": ctx.scale}
        of_q = torch.baddbmm(none, of_score, k, **scaled)
        of_k = torch.baddbmm(none, of_score.transpose(1, 2), q, **scaled)
        found = (of_q, of_k, of_v)
        return *(x.view(*ctx.shape[:2], *x.shape[1:]) for x in found), None


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Turns a boolean [B,Q,K] into the additive mask [B,1,Q,K] of `dtype`.

    A query that may attend nothing attends everything, so no row is NaN.
    """
    allowed = allowed | ~allowed.any(-1, keepdim=True)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, float("-inf")).unsqueeze(1)


def key_mask(modality: Tensor) -> Tensor:
    """Allowed [B,1,K]: every used slot of `modality` [B,K]."""
    return (modality != PADDING).unsqueeze(1)


def input_masks(modality: Tensor, sizes: Sequence[int], dtype: torch.dtype) -> Mask:
    """Masks of inputs that lie behind one another in the slots of `modality` [B,N]."""
    return tuple((len(part[0]), None if bool((part != PADDING).all())
                  else additive(key_mask(part), dtype)) for part in modality.split(sizes, 1))


def target_mask(modality: Tensor, until: Tensor) -> Tensor:
    """Allowed [B,M,M] among targets: slots of the same modality before the query's `until` [B,M].

    Grids see their whole modality (until = its end), sequences themselves and what is to their
    left (until = own slot + 1); modalities are decoded independently given the context.
    """
    same = modality.unsqueeze(2) == modality.unsqueeze(1)
    slots = torch.arange(modality.shape[1], device=modality.device)
    return same & (slots < until.unsqueeze(2))
