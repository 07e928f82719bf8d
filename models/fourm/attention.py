"""The one attention function and the masks it takes.

B batch, H heads, Q/K query and key positions, D head width. `scaled_dot_product_attention` picks
Flash kernels, but its CPU kernel is slow at bf16 gradients: 136 ms forward and backward for
B 64, H 4, N 128, D 64 on one AMX core, where plain matrix products take 37 ms (fp32: 62 and 65).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PADDING = -1
"""Modality id of an unused slot."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention [B,H,Q,D] with an additive mask [B,1,Q or 1,K] from below."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        score = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return (score if mask is None else score + mask).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


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


def part_mask(part: Tensor) -> Tensor:
    """Allowed [B,N,N]: slots of the same input, by the numbers `part` [B,N]."""
    return part.unsqueeze(2) == part.unsqueeze(1)


def target_mask(modality: Tensor, until: Tensor) -> Tensor:
    """Allowed [B,M,M] among targets: slots of the same modality before the query's `until` [B,M].

    Grids see their whole modality (until = its end), sequences themselves and what is to their
    left (until = own slot + 1); modalities are decoded independently given the context.
    """
    same = modality.unsqueeze(2) == modality.unsqueeze(1)
    slots = torch.arange(modality.shape[1], device=modality.device)
    return same & (slots < until.unsqueeze(2))
