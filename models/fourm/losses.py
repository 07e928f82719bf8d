"""Cross-entropy over several vocabularies, each modality against its own matrix.

Scores exist once, in the precision of the matrix product, and become their own gradient in place,
a block of rows at a time: rounding apart what `F.cross_entropy` computes, without its copies of
all scores. R rows, D width, V vocabulary, all vocabularies of m modalities behind one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models.fourm.batch import IGNORED

_BLOCK = {"cpu": 1 << 19, "cuda": 1 << 27}
"""Scores that are turned at once: on a CPU, what its caches hold."""


def summed_losses(
    hidden: Tensor, weight: Tensor, targets: Sequence[Tensor], sizes: Sequence[int]
) -> Tensor:
    """Cross-entropy [m] summed over the rows of each modality that carry a loss.

    Args:
        hidden: Decoder outputs [R, D], sorted by modality.
        weight: [sum of V, D].
        targets: Ids of the rows of each modality, `IGNORED` where there is no loss.
        sizes: Vocabulary of each modality.
    """
    # The compiler fuses these itself, and knows no loops over lengths that vary.
    if torch.compiler.is_compiling():
        parts = zip(hidden.split([len(part) for part in targets]), weight.split(list(sizes)),
                    targets, strict=True)
        return torch.stack([
            F.cross_entropy(F.linear(x, w).float(), ids, ignore_index=IGNORED, reduction="sum")
            for x, w, ids in parts
        ])
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    asked = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _SummedLosses.apply(
        hidden, weight, tuple(targets), tuple(sizes), asked
    )


class _SummedLosses(torch.autograd.Function):
    """Turns scores into gradients on the way forward, where they are still in the cache."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: tuple[Tensor, ...],
        sizes: tuple[int, ...], asked: bool,
    ) -> Tensor:
        cast = weight.to(hidden.dtype)
        rows = [len(part) for part in targets]
        losses, scores = [], []
        with torch.autocast(hidden.device.type, enabled=False):
            for x, w, ids in zip(hidden.split(rows), cast.split(sizes), targets, strict=True):
                found = x @ w.t()
                losses.append(_turned(found, ids, asked))
                scores.append(found)
        if asked:
            ctx.save_for_backward(hidden, cast, *scores)
        ctx.rows, ctx.sizes, ctx.dtype = rows, sizes, weight.dtype
        return torch.stack(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factors: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, *gradients = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = weight.new_empty(weight.shape, dtype=ctx.dtype) \
            if ctx.needs_input_grad[1] else None
        first, start = 0, 0
        for factor, found, rows, size in zip(factors, gradients, ctx.rows, ctx.sizes, strict=True):
            at, of = slice(first, first + rows), slice(start, start + size)
            if of_hidden is not None:
                torch.mm(found, weight[of], out=of_hidden[at]).mul_(factor)
            if of_weight is not None:
                scaled = hidden[at] * factor
                if ctx.dtype == hidden.dtype:
                    torch.mm(found.t(), scaled, out=of_weight[of])
                else:
                    of_weight[of] = found.t() @ scaled
            first, start = first + rows, start + size
        return of_hidden, of_weight, None, None, None


def _turned(scores: Tensor, ids: Tensor, asked: bool) -> Tensor:
    """The summed loss of scores [R, V], which become its gradient if `asked`."""
    total = torch.zeros((), dtype=torch.float32, device=scores.device)
    step = max(1, _BLOCK.get(scores.device.type, _BLOCK["cuda"]) // scores.shape[1])
    used = (ids != IGNORED).float().unsqueeze(1)
    ids = ids.clamp(min=0).unsqueeze(1)
    for block, target, weight in zip(scores.split(step), ids.split(step), used.split(step),
                                     strict=True):
        wide = block.float()  # itself, if it is fp32
        wide.sub_(wide.amax(-1, keepdim=True))
        wanted = wide.gather(1, target)
        size = wide.exp_().sum(-1, keepdim=True)
        total += ((size.log() - wanted) * weight).sum()
        if asked:
            wide.mul_(weight / size).scatter_add_(1, target, -weight)
            block.copy_(wide)
    return total
