"""Transformer parts that the vision transformers and the diffusion decoders share.

Shapes: B batch, N tokens, D width, C channels, H, W pixels, h, w grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vq.vqvae import attention

EPS = 1e-6


class Attention(nn.Module):
    """Self-attention with packed queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to the same shape."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    """Two linear layers around an activation: `gelu` or `tanh`."""

    def __init__(self, width: int, hidden: int, activation: str = "gelu") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation = F.gelu if activation == "gelu" else torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to the same shape."""
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def add_positions(x: Tensor, table: Tensor) -> Tensor:
    """Adds a position table [1, D, h0, w0] to a grid [B, D, h, w], resized bicubically."""
    if x.shape[2:] != table.shape[2:]:
        size = (x.shape[2], x.shape[3])
        table = F.interpolate(table, size=size, mode="bicubic", align_corners=False)
    return x + table


def to_tokens(grid: Tensor) -> Tensor:
    """Grid [B, D, h, w] to row-major tokens [B, N, D]."""
    return grid.flatten(2).transpose(1, 2)


def to_grid(tokens: Tensor, height: int, breadth: int) -> Tensor:
    """The inverse of `to_tokens`."""
    return tokens.transpose(1, 2).unflatten(2, (height, breadth))
