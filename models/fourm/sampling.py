"""Drawing tokens from logits, with noise that belongs to the sample and not to the batch.

Every random number is a hash of (seed of the sample, stream, position), so a sample comes out
the same whatever it is batched with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

GREEDY = 1e-8
"""Temperatures up to this one take the most likely token."""

_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # constants of the splitmix64 generator
_GOLDEN = 0x9E3779B97F4A7C15


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    for shift, factor in zip((30, 27), _MIX, strict=True):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def uniform(seeds: Sequence[int], stream: int, count: int) -> Tensor:
    """Random numbers in (0, 1), float32 [len(seeds), count].

    Args:
        seeds: One a row; equal seeds give equal rows.
        stream: Tells apart the draws for one seed, such as the step.
        count: Numbers a row.
    """
    with np.errstate(over="ignore"):
        rows = np.asarray([int(seed) % (1 << 64) for seed in seeds], np.uint64) * np.uint64(_GOLDEN)
        rows = _mixed(rows + np.uint64(stream % (1 << 64)))
        columns = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        bits = _mixed(rows[:, None] + columns[None, :]) >> np.uint64(40)
    return torch.from_numpy((bits.astype(np.float32) + 0.5) * np.float32(2**-24))


def filtered(logits: Tensor, top_k: float = 0, top_p: float = 0.0) -> Tensor:
    """Logits with unlikely tokens set to -inf.

    Args:
        logits: [..., V], untempered.
        top_k: Tokens kept: a count, or a share of V if between 0 and 1; 0 keeps all.
        top_p: Least probability mass kept, most likely tokens first, and with the least likely one
            those that are as likely; 0 or 1 keeps all.
    """
    if top_k:
        kept = max(1, int(top_k * logits.shape[-1]) if top_k < 1 else int(top_k))
        if kept < logits.shape[-1]:
            least = logits.topk(kept, dim=-1).values[..., -1:]
            logits = _from(least, logits)
    if 0.0 < top_p < 1.0:
        ordered = _descending(logits)
        share = ordered.softmax(-1)
        # The token that crosses the threshold is kept, so at least one always is.
        before = share.cumsum(-1).sub_(share)
        limit = torch.full_like(before[..., :1], top_p)
        least_kept = torch.searchsorted(before, limit, right=True) - 1
        logits = _from(ordered.gather(-1, least_kept), logits)
    return logits


def _from(least: Tensor, logits: Tensor) -> Tensor:
    """Logits [..., V] with those below `least` [..., 1] set to -inf. Done by sums: to choose value
    by value, as `where` does, takes a CPU ten times as long, which cannot foresee the choices."""
    kind = torch.finfo(logits.dtype)
    below = (logits - least.clamp(min=kind.min)).clamp_(max=0)
    return logits + F.threshold(below, -kind.tiny, -torch.inf, inplace=True)


def _descending(values: Tensor) -> Tensor:
    """Values [..., V] sorted along the last dimension. NumPy sorts rows on a CPU with vector
    instructions, several times faster than torch."""
    if values.device.type != "cpu" or values.dtype != torch.float32:
        return values.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(values.detach().numpy(), axis=-1)).flip(-1)


def sample(
    logits: Tensor, noise: Tensor, temperature: float, top_k: float = 0, top_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Draws one token from each row of logits.

    Args:
        logits: [..., V].
        noise: Uniform numbers in (0, 1), [...].
        temperature: Divides the filtered logits; near 0 the most likely token is taken.
        top_k: See `filtered`.
        top_p: See `filtered`.

    Returns:
        Tokens int64 [...] and their probabilities float32 [...] after filter and temperature.
        Greedy tokens carry their untempered probability, so that their order means something.
    """
    logits = logits.float()
    if temperature <= GREEDY:
        best = logits.argmax(-1)
        return best, logits.softmax(-1).gather(-1, best.unsqueeze(-1)).squeeze(-1)
    kept = filtered(logits, top_k, top_p)
    shares = (kept if temperature == 1 else kept / temperature).softmax(-1)
    edges = shares.cumsum(-1)
    # Scaled by the last edge: rounding must not leave a draw beyond every token.
    draw = noise.to(edges.device).unsqueeze(-1) * edges[..., -1:]
    tokens = torch.searchsorted(edges, draw).clamp_(max=logits.shape[-1] - 1)
    confidence = shares.gather(-1, tokens)
    return tokens.squeeze(-1), confidence.squeeze(-1)
