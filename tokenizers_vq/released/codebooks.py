"""Bottlenecks of the released tokenizers: one codebook with moving averages, or memcodes.

Both quantise latents [B, D, h, w] in full precision. Shapes: B batch, D latent width, V codes,
K codebooks (heads), h, w grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vq.quantizers import Quantized, full_precision


class _Codes(nn.Module):
    """Buffers of a codebook: rows, how often each was used lately, whether they are trained."""

    initted: Tensor
    cluster_size: Tensor
    embed: Tensor

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("initted", torch.ones(1))
        self.register_buffer("cluster_size", torch.zeros(vocab_size))
        self.register_buffer("embed", F.normalize(torch.randn(vocab_size, width), dim=-1))


class MovingCodebook(nn.Module):
    """VQ whose codes follow their latents by moving averages.

    Args:
        vocab_size: V.
        width: D.
        cosine: Nearest by angle, else by Euclidean distance.
        norm_latents: Scales latents to unit length before everything else.
        decay: Of the moving averages.
        dead_below: A code used less often than this, as a moving count per batch, is replaced
            by a random latent of the batch; 0 keeps all.
        commitment: Weight of the pull of latents towards their code.
    """

    def __init__(
        self, vocab_size: int, width: int, *, cosine: bool = True, norm_latents: bool = False,
        decay: float = 0.99, dead_below: float = 0.0, commitment: float = 1.0,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.cosine, self.norm_latents = cosine, norm_latents
        self.decay, self.dead_below, self.commitment = decay, dead_below, commitment
        self._codebook = _Codes(vocab_size, width)

    @property
    def embed(self) -> Tensor:
        """Codes [V, D]."""
        return self._codebook.embed

    def forward(self, z: Tensor) -> Quantized:
        """Quantises [B, D, h, w]; in training the codebook moves and gradients pass through."""
        with full_precision(z):
            z = z.float()
            z = F.normalize(z, dim=1) if self.norm_latents else z
            flat = z.movedim(1, -1).flatten(0, -2)
            nearest = self._nearest(flat.detach())
            tokens = nearest.view(z.shape[0], *z.shape[2:])
            codes = self.lookup(tokens)
            if not self.training:
                return Quantized(codes, tokens, z.new_zeros(()))
            self._follow(flat.detach(), nearest)
            loss = self.commitment * F.mse_loss(z, codes)
            return Quantized(z + (codes - z).detach(), tokens, loss)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Codes [B, D, h, w] of tokens [B, h, w], as stored: not normalised."""
        return F.embedding(tokens, self.embed).movedim(-1, 1)

    def _nearest(self, flat: Tensor) -> Tensor:
        if self.cosine:
            return (F.normalize(flat, dim=-1) @ F.normalize(self.embed, dim=-1).T).argmax(-1)
        return torch.cdist(flat, self.embed).argmin(-1)

    @torch.no_grad()
    def _follow(self, flat: Tensor, nearest: Tensor) -> None:
        if self.cosine:
            flat = F.normalize(flat, dim=-1)
        count = torch.bincount(nearest, minlength=self.vocab_size).to(flat.dtype)
        total = torch.zeros_like(self.embed).index_add_(0, nearest, flat)
        mean = total / count.clamp(min=1)[:, None]
        target = F.normalize(mean, dim=-1) if self.cosine else mean
        unused = F.normalize(self.embed, dim=-1) if self.cosine else self.embed
        target = torch.where((count > 0)[:, None], target, unused)
        self._codebook.cluster_size.lerp_(count, 1 - self.decay)
        self.embed.lerp_(target, 1 - self.decay)
        dead = self._codebook.cluster_size < self.dead_below
        if dead.any():
            rows = torch.randint(len(flat), (int(dead.sum()),), device=flat.device)
            self.embed[dead] = flat[rows]
            self._codebook.cluster_size[dead] = self.dead_below


class _PerHead(nn.Module):
    """A square matrix for each codebook."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, width, width) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[K, V, d] to the same shape."""
        return x @ self.weight


class Memcodes(nn.Module):
    """Several codebooks, each for its slice of the latent; a token is the code most attended to.

    Args:
        heads: K.
        vocab_size: V of each codebook.
        width: D / K.
        temperature: Of the Gumbel noise in training.
    """

    def __init__(self, heads: int, vocab_size: int, width: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.heads, self.vocab_size, self.temperature = heads, vocab_size, temperature
        self.codes = nn.Parameter(torch.randn(heads, vocab_size, width))
        self.to_k = _PerHead(heads, width)
        self.to_v = _PerHead(heads, width)

    def forward(self, z: Tensor) -> Quantized:
        """Quantises [B, D, h, w]; tokens are [B, K, h, w]."""
        with full_precision(z):
            parts = z.float().unflatten(1, (self.heads, -1))
            scale = parts.shape[2] ** -0.5
            logits = torch.einsum("bkdhw,kvd->bkhwv", parts * scale, self.to_k(self.codes))
            tokens = logits.argmax(-1)
            loss = z.new_zeros((), dtype=torch.float32)
            if not self.training:
                return Quantized(self.lookup(tokens), tokens, loss)
            chosen = F.gumbel_softmax(logits, tau=self.temperature, hard=True, dim=-1)
            values = torch.einsum("bkhwv,kvd->bkdhw", chosen, self.to_v(self.codes))
            return Quantized(values.flatten(1, 2), chosen.argmax(-1), loss)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Latents [B, D, h, w] of tokens [B, K, h, w]."""
        table = self.to_v(self.codes)
        heads = torch.arange(self.heads, device=tokens.device).view(-1, 1, 1)
        return table[heads, tokens].movedim(-1, 2).flatten(1, 2)
