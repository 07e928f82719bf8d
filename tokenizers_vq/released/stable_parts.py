"""Parts that Stable Diffusion's networks share, under the parameter names of its published files.

After latent diffusion (Rombach et al., arXiv 2112.10752). Shapes: B batch, C channels, H, W pixels
or cells, T width of the time embedding, N context tokens of width E.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32


class ResBlock(nn.Module):
    """Two convolutions behind norms, and the time between them where there is one.

    Args:
        channels_in: Channels that come in.
        channels_out: Channels that go out.
        time: T; 0: none.
        eps: Of the norms.
    """

    def __init__(
        self, channels_in: int, channels_out: int, time: int = 0, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels_in, eps)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        if time:
            self.time_emb_proj = nn.Linear(time, channels_out)
        self.norm2 = nn.GroupNorm(GROUPS, channels_out, eps)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """[B, C, H, W] and [B, T] to [B, C', H, W]."""
        y = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            y = y + self.time_emb_proj(F.silu(time))[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class CrossAttention(nn.Module):
    """Attention of tokens to themselves, or to a context of width `context`."""

    def __init__(self, width: int, heads: int, context: int = 0, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context or width, width, bias=bias)
        self.to_v = nn.Linear(context or width, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """[B, L, C] and [B, N, E] to [B, L, C]."""
        seen = x if context is None else context
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(x), self.to_k(seen), self.to_v(seen))
        )
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Gate(nn.Module):
    """A linear layer, half of which gates the other half."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 4 * width  # the published list has a dropout in its middle
        self.net = nn.Sequential(_Gate(width, hidden), nn.Identity(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _Block(nn.Module):
    """Self-attention, attention to the context, and a gated MLP, each behind a norm."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = CrossAttention(width, heads)
        self.attn2 = CrossAttention(width, heads, context)
        self.ff = _FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the cells of a grid, around 1 x 1 convolutions."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, 1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([_Block(width, heads, context)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[B, C, H, W] and [B, N, E] to [B, C, H, W]."""
        y = self.proj_in(self.norm(x))
        tokens = y.flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Half the side. `padded` at both sides, as in the UNet, or, as in the VAE, at one."""

    def __init__(self, width: int, padded: bool = True) -> None:
        super().__init__()
        self.padded = padded
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=int(padded))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H / 2, W / 2]."""
        return self.conv(x if self.padded else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the side: every cell four times, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, 2 H, 2 W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class TimeEmbedding(nn.Module):
    """Steps as cosines and sines of `width` channels, through two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, 4 * width)
        self.linear_2 = nn.Linear(4 * width, 4 * width)

    def forward(self, t: Tensor) -> Tensor:
        """int64 [B] to [B, 4 * width]."""
        half = self.width // 2
        scale = 10_000 ** (-torch.arange(half, device=t.device, dtype=torch.float32) / half)
        angles = t[:, None].float() * scale
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))
