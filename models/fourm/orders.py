"""In which order the positions of a grid are decoded, and which are hidden and drawn again.

R rows, L positions. An order is a rank of every position: lower ones come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.fourm.sampling import uniform
from models.fourm.spec import ModalitySpec

_ORDER_STREAM, _REMASK_STREAM = -1, -(1 << 20)
_LEAST = 1e-6


def random_ranks(seeds: Sequence[int], length: int) -> Tensor:
    """A random order of each row's own, float32 [R, L] in 0..1."""
    return uniform(seeds, _ORDER_STREAM, length)


def halton_ranks(spec: ModalitySpec) -> Tensor:
    """The Halton order of a grid, float32 [L] in 0..1."""
    square = spec.grid**2 == spec.max_tokens and not spec.learned_positions
    side = (spec.grid, spec.grid) if square else (1, spec.max_tokens)
    ranks = torch.empty(spec.max_tokens)
    ranks[torch.tensor(halton_order(*side))] = torch.arange(spec.max_tokens) / spec.max_tokens
    return ranks


@lru_cache
def halton_order(height: int, width: int) -> tuple[int, ...]:
    """Positions of a grid, row-major, so that every prefix is spread evenly over it.

    Cells in the order in which the Halton sequence of bases 2 (columns) and 3 (rows) first meets
    them; "Halton Scheduler For Masked Generative Image Transformer", Besnier et al., ICLR 2025,
    arXiv 2503.17076. Tokens of one step then lie far apart and depend little on each other.
    """
    count = 4 * height * width
    while True:
        numbers = np.arange(1, count + 1)
        cells = _scaled_inverse(numbers, 3, height) * width + _scaled_inverse(numbers, 2, width)
        found, first = np.unique(cells, return_index=True)
        if len(found) == height * width:
            return tuple(int(cell) for cell in found[np.argsort(first)])
        count *= 2


def _scaled_inverse(numbers: NDArray[np.int64], base: int, size: int) -> NDArray[np.int64]:
    """floor(size * x), x the digits of each number mirrored at the point, in whole numbers."""
    mirrored, power = np.zeros_like(numbers), 1
    while numbers.any():
        mirrored, numbers = mirrored * base + numbers % base, numbers // base
        power *= base
    return mirrored * size // power


def to_redraw(
    seeds: Sequence[int], step: int, confidence: Tensor, free: Tensor, count: int
) -> Tensor:
    """Positions [R, count] that are hidden again, to be drawn anew in later steps.

    Drawn without replacement, the likelier the less sure the model was of a token: confidence
    based remasking after "Remasking Discrete Diffusion Models with Inference-Time Scaling",
    Wang et al., arXiv 2503.00307. A fixed number is hidden, so that shapes are static, and the
    weight of a token is 1 - confidence.

    Args:
        seeds: One a row.
        step: Number of the decoding step.
        confidence: float32 [R, L] in 0..1.
        free: bool [R, L]: positions to choose from, at least `count` a row.
        count: Positions to hide.
    """
    noise = uniform(seeds, _REMASK_STREAM - step, free.shape[1]).to(confidence.device)
    # The largest of log(weight) + Gumbel noise are a draw without replacement.
    score = (1 - confidence).clamp(min=_LEAST).log() - (-noise.log()).log()
    return score.masked_fill(~free, -torch.inf).topk(count, dim=1).indices
