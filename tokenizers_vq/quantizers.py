"""Bottlenecks that turn latent vectors into integers: FSQ, VQ and LFQ.

FSQ (Mentzer et al., arXiv 2309.15505) is the default: it has no codebook to collapse, no
commitment loss and nothing to synchronise between replicas. Its levels are equally spaced, so a
bell-shaped latent would leave the outer ones empty; the latent is normalised and squashed by
2*sigmoid(1.6 z) - 1, which maps a Gaussian nearly onto a uniform (iFSQ). The VQ option has a
learned codebook: cosine similarity, rotation trick, k-means start, dead codes replaced. LFQ (Yu
et al., arXiv 2310.05737) takes the signs of the latent: a token is a number of as many bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

_SPREAD_SIZE = 1 << 24  # latents x codes that the loss of missing codes looks at
_RARE = 0.01  # share of its even use below which a code counts as missing
DEAD_CODE = 32
"""A VQ code that occurs so many times more seldom than the average is replaced by a latent of the
batch, as in the released tokenizers."""


def full_precision(like: Tensor) -> AbstractContextManager[None]:
    """Switches autocast off where the tensor lies; the meta device has none."""
    if like.device.type == "meta":
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)


class Quantized(NamedTuple):
    """What a bottleneck gives: latents [B, N, D], tokens int64 [B, N], an auxiliary loss []."""

    latents: Tensor
    tokens: Tensor
    loss: Tensor


class Whitening(nn.Module):
    """Zero mean, unit variance and no correlation between the dimensions.

    It keeps all levels of all dimensions in use from the first step on. Without it a training of
    a minute ends with one code, and with variances alone with a twentieth of them, as every
    dimension learns the same easiest thing. Cholesky factors move smoothly from step to step,
    where eigenvectors would swap.

    Training takes the statistics of the batch. Moving averages of them would not do afterwards:
    the dimensions before whitening are nearly collinear, so a small error is much amplified
    (depth error 0.069 instead of 0.031); `fit` measures them exactly once the weights rest.
    """

    mean: Tensor
    cov: Tensor

    def __init__(self, dim: int, eps: float = 1e-4) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("cov", torch.eye(dim))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Sets the statistics used outside training from [M, dim]; rows that are not finite do not
        count."""
        x = x[x.isfinite().all(1)].double()
        self.mean.copy_(x.mean(0))
        self.cov.copy_((x - x.mean(0)).T @ (x - x.mean(0)) / len(x))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] float32 to the same shape."""
        flat = x.flatten(0, -2)
        mean, cov = self.mean, self.cov
        if self.training:
            mean = flat.mean(0)
            cov = (flat - mean).T @ (flat - mean) / len(flat)
        cov = cov + self.eps * torch.eye(len(cov), device=x.device)
        if self.training:
            # What is not finite stays so, for the trainer to skip: an error would end each attempt.
            factor, failed = torch.linalg.cholesky_ex(cov)
            factor = factor.masked_fill(failed > 0, torch.nan)
        else:
            factor = torch.linalg.cholesky(cov)
        white = torch.linalg.solve_triangular(factor, (flat - mean).T, upper=False)
        return white.T.reshape(x.shape)


class FiniteScalar(nn.Module):
    """FSQ with matched activation; a token is the mixed-radix number of its levels.

    Args:
        dim: Width of the latents that come in and go out.
        levels: Number of values per latent dimension; the vocabulary is their product.
        jitter: Probability with which a dimension moves by one level in training, so that
            the decoder forgives predictions that are nearly right.
        spread: Weight of a loss that grows as codes are left out.
    """

    step: Tensor

    def __init__(
        self, dim: int, levels: tuple[int, ...], jitter: float = 0.0, spread: float = 0.0
    ) -> None:
        super().__init__()
        from vector_quantize_pytorch import FSQ

        self.vocab_size = math.prod(levels)
        self.levels, self.jitter, self.spread = levels, jitter, spread
        self.down = nn.Linear(dim, len(levels))
        self.whiten = Whitening(len(levels))
        self.up = nn.Linear(len(levels), dim)
        with torch.device("cpu"):  # it reads its own buffers, which the meta device does not allow
            self.fsq = FSQ(list(levels), preserve_symmetry=True, bound_hard_clamp=True)
        step = torch.tensor([2.0 / (count - 1) for count in levels])
        self.register_buffer("step", step, persistent=False)

    def forward(self, z: Tensor) -> Quantized:
        """Quantises [B, N, D]; gradients pass straight through."""
        with full_precision(z):
            squashed = 2 * torch.sigmoid(1.6 * self.whiten(self.down(z.float()))) - 1
            codes, tokens = self.fsq(squashed)
            if self.training and self.jitter > 0:
                codes = self._jittered(codes)
            loss = z.new_zeros((), dtype=torch.float32)
            if self.training and self.spread > 0:
                loss = self.spread * self._missing(squashed.flatten(0, -2))
            # What is no number has no place among the codes, and the statistics of them need one.
            return Quantized(self.up(codes), tokens.long().clamp(0, self.vocab_size - 1), loss)

    @torch.no_grad()
    def calibrate(self, latents: Iterable[Tensor]) -> None:
        """Measures the statistics of latents [B, N, D], in the precision of `forward`."""
        raw = []
        for z in latents:
            with full_precision(z):
                raw.append(self.down(z.float()))
        self.whiten.fit(torch.cat(raw).flatten(0, 1))

    def _missing(self, squashed: Tensor) -> Tensor:
        """Codes that [M, dims] leave out, softly: 0 where all are in use alike, 1 where none is.

        A latent counts for the levels around it, by a Gaussian of a third of their spacing, so
        that the histogram has a gradient. Logarithms make a code that lacks cost most and one that
        has its even share next to nothing: frequent codes may stay frequent. (Of depth, 98 % of
        1,000 codes are in use at a relative error of 0.0176; with the entropy of the histogram
        instead, which asks for even use, 92 % at 0.0182.) Whitening makes dimensions uncorrelated,
        this also moves what they leave empty together: flat backgrounds, whose latents are alike.
        """
        squashed, steps = self._told_apart(squashed)
        joint = squashed.new_ones(len(squashed), 1)
        for column, step in zip(squashed.unbind(1), steps, strict=True):
            places = torch.arange(-1, 1 + step / 2, step, device=squashed.device)
            near = (-4.5 * ((column[:, None] - places) / step).square()).softmax(1)
            joint = (joint[:, :, None] * near[:, None]).flatten(1)
        even = joint.mean(0) * joint.shape[1]
        most, least = math.log1p(_RARE), math.log(_RARE)
        return (most - (even + _RARE).log().mean()) / (most - least)

    def _told_apart(self, squashed: Tensor) -> tuple[Tensor, list[float]]:
        """Dimensions, drawn anew each time, of which there are twice as many latents as codes, with
        the spacing of their levels: all of them, of up to 2,896 codes in large batches. Fewer
        latents would not tell which codes are missing."""
        chosen, codes = list[int](), 1
        for dim in torch.randperm(squashed.shape[1]).tolist():
            more = codes * self.levels[dim]
            if not chosen or 2 * more <= min(len(squashed), _SPREAD_SIZE // more):
                chosen.append(dim)
                codes = more
        most = max(1, _SPREAD_SIZE // codes)
        if len(squashed) > most:
            squashed = squashed[torch.randperm(len(squashed), device=squashed.device)[:most]]
        chosen.sort()
        return squashed[:, chosen], [2.0 / (self.levels[dim] - 1) for dim in chosen]

    def _jittered(self, codes: Tensor) -> Tensor:
        chance = torch.rand_like(codes)
        sign = (chance < self.jitter / 2).to(codes.dtype) - (
            (chance >= self.jitter / 2) & (chance < self.jitter)
        ).to(codes.dtype)
        moved = codes + sign * self.step
        return torch.where(moved.abs() <= 1 + 1e-4, moved, codes)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Latents [B, N, D] of tokens [B, N]."""
        return self.up(self.fsq.indices_to_codes(tokens))


class Codebook(nn.Module):
    """VQ with a learned codebook of unit vectors.

    Args:
        dim: Width of the latents that come in and go out.
        vocab_size: Number of codes.
        code_dim: Width of a code; small (8 to 32) keeps the codebook in use.
    """

    def __init__(self, dim: int, vocab_size: int, code_dim: int = 16) -> None:
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize

        self.vocab_size = vocab_size
        self.norm = nn.LayerNorm(dim)
        self.vq = VectorQuantize(
            dim=dim,
            codebook_size=vocab_size,
            codebook_dim=code_dim,
            use_cosine_sim=True,
            rotation_trick=True,
            kmeans_init=True,
            threshold_ema_dead_code=1,  # set for each batch
            decay=0.99,
            commitment_weight=0.25,
        )

    def forward(self, z: Tensor) -> Quantized:
        """Quantises [B, N, D]; the codebook follows by moving averages in training."""
        if self.training:
            # The library takes a number of latents. Whichever it is, it is most of what codes of a
            # large book get: 2 of 2,048 replaced a third of 1,000 codes at every step.
            book = self.vq._codebook
            rare = z.shape[0] * z.shape[1] / self.vocab_size / DEAD_CODE
            book.threshold_ema_dead_code = book.reset_cluster_size = rare
        with full_precision(z):
            latents, tokens, loss = self.vq(self.norm(z.float()))
        return Quantized(latents, tokens.long(), loss.sum())

    def lookup(self, tokens: Tensor) -> Tensor:
        """Latents [B, N, D] of tokens [B, N]."""
        return self.vq.get_output_from_indices(tokens)


class LookupFree(nn.Module):
    """LFQ: one bit a dimension, and an entropy loss that keeps codes sure and all in use.

    Args:
        dim: Width of the latents that come in and go out.
        vocab_size: Number of codes, a power of two.
    """

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        from vector_quantize_pytorch import LFQ

        self.vocab_size = vocab_size
        self.norm = nn.LayerNorm(dim)
        # The loss compares each latent with all codes; a share of them bounds its memory.
        share = min(1.0, 4096 / vocab_size)
        self.lfq = LFQ(dim=dim, codebook_size=vocab_size, frac_per_sample_entropy=share)

    def forward(self, z: Tensor) -> Quantized:
        """Quantises [B, N, D]; gradients pass straight through."""
        with full_precision(z):
            latents, tokens, loss = self.lfq(self.norm(z.float()))
        return Quantized(latents, tokens.long(), loss.sum())

    def lookup(self, tokens: Tensor) -> Tensor:
        """Latents [B, N, D] of tokens [B, N]."""
        return self.lfq.indices_to_codes(tokens)


def perplexity(tokens: Tensor, vocab_size: int) -> Tensor:
    """exp of the entropy of the code histogram, [] in 1..vocab_size, on the tokens' device."""
    flat = tokens.reshape(-1)  # counted so that no host waits for the device, as by `bincount`
    ones = torch.ones_like(flat, dtype=torch.float32)
    counts = ones.new_zeros(vocab_size).index_add_(0, flat, ones)
    share = counts / counts.sum().clamp(min=1)
    return (-(share * share.clamp(min=1e-12).log()).sum()).exp()


def code_statistics(tokens: Tensor, vocab_size: int) -> dict[str, float]:
    """How much of a vocabulary is used.

    Returns:
        `usage`: share of codes that occur, in 0..1; `perplexity`: exp of the entropy of the
        code histogram, in 1..vocab_size.
    """
    counts = torch.bincount(tokens.reshape(-1), minlength=vocab_size)
    return {
        "usage": float((counts > 0).double().mean()),
        "perplexity": float(perplexity(tokens, vocab_size)),
    }
