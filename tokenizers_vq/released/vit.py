"""Encoders and decoders without diffusion: vision transformers, and MLPs for single vectors.

Shapes: B batch, C channels, H, W pixels, h, w grid, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vq.quantizers import full_precision
from tokenizers_vq.released.layers import EPS, Block, Mlp, add_positions, to_grid, to_tokens


class ViTEncoder(nn.Module):
    """Patches to features; a class map comes in embedded.

    Args:
        channels: Channels of the values.
        patch: Pixels per token and side; 1 for feature maps.
        width, depth, heads, hidden: Of the transformer; `hidden` is the MLPs' inner width.
        grid: (h, w) of the position table; others resize it.
        post_hidden: Inner width of the tanh MLP after the blocks; 0 leaves it out.
    """

    def __init__(
        self, *, channels: int, patch: int, width: int, depth: int, heads: int, hidden: int,
        grid: tuple[int, int], post_hidden: int = 0,
    ) -> None:
        super().__init__()
        self.pos_emb = nn.Parameter(torch.zeros(1, width, *grid), requires_grad=False)
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        if post_hidden:
            self.norm_mlp = nn.LayerNorm(width, eps=EPS)
            self.post_mlp = Mlp(width, post_hidden, "tanh")

    def forward(self, x: Tensor) -> Tensor:
        """Values [B, C, H, W] to features [B, D, h, w]."""
        x = add_positions(self.proj(x), self.pos_emb)
        height, breadth = x.shape[2:]
        x = to_tokens(x)
        for block in self.blocks:
            x = block(x)
        if hasattr(self, "post_mlp"):
            # In full precision: what follows chooses a code.
            with full_precision(x):
                x = x.float()
                x = x + self.post_mlp(self.norm_mlp(x))
        return to_grid(x, height, breadth)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7 x 7 convolution and a channel MLP, scaled by `gamma`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class ViTDecoder(nn.Module):
    """Features to values; the arguments are those of `ViTEncoder`.

    `channels` counts output channels (classes for logits), `out_blocks` the ConvNeXt blocks that
    smooth the result.
    """

    def __init__(
        self, *, channels: int, patch: int, width: int, depth: int, heads: int, hidden: int,
        grid: tuple[int, int], post_hidden: int = 0, out_blocks: int = 0,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.pos_emb = nn.Parameter(torch.zeros(1, width, *grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        if post_hidden:
            self.norm_mlp = nn.LayerNorm(width, eps=EPS)
            self.post_mlp = Mlp(width, post_hidden, "tanh")
        self.out_proj = nn.Linear(width, channels * patch**2)
        if out_blocks:
            self.out_conv = nn.Sequential(*(ConvNeXtBlock(channels) for _ in range(out_blocks)))

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, D, h, w] to values [B, C, H, W]."""
        x = add_positions(x, self.pos_emb)
        height, breadth = x.shape[2:]
        x = to_tokens(x)
        for block in self.blocks:
            x = block(x)
        if hasattr(self, "post_mlp"):
            x = x + self.post_mlp(self.norm_mlp(x))
        x = F.pixel_shuffle(to_grid(self.out_proj(x), height, breadth), self.patch)
        return self.out_conv(x) if hasattr(self, "out_conv") else x


class _Bottleneck(nn.Module):
    """An inverted bottleneck: four times wider inside."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class BottleneckMLP(nn.Module):
    """Residual MLP on single vectors, at every cell of a grid alike."""

    def __init__(
        self, *, channels_in: int, channels_out: int, width: int, depth: int, hidden: int
    ) -> None:
        super().__init__()
        self.linear_in = nn.Linear(channels_in, width)
        self.linear_out = nn.Linear(width, channels_out)
        self.blocks = nn.ModuleList(_Bottleneck(width, hidden) for _ in range(depth))
        self.layernorms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C', h, w]."""
        x = self.linear_in(x.movedim(1, -1))
        for block, norm in zip(self.blocks, self.layernorms, strict=True):
            x = x + block(norm(x))
        return self.linear_out(x).movedim(-1, 1)
