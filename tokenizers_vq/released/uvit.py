"""Diffusion decoder with convolutions outside and a transformer at the bottom (UViT).

After Hoogeboom et al. (arXiv 2301.11093): residual blocks at high resolution, and at the lowest
one a transformer whose norms are shifted, scaled and gated by the diffusion step.

Shapes: B batch, C channels, H, W pixels, h, w grid, N = h * w, D width of the condition,
M width of the transformer, E time embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vq.released.layers import EPS, Attention, Mlp, add_positions, to_grid, to_tokens
from tokenizers_vq.released.unet import GROUPS, time_features


class _TimeEmbedding(nn.Module):
    """Step features to the embedding [B, E]."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, embedding)
        self.linear_2 = nn.Linear(embedding, embedding)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(features)))


class ResnetBlock(nn.Module):
    """Two convolutions; the time embedding is added between them."""

    def __init__(self, channels: int, out: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, out)
        self.norm2 = nn.GroupNorm(GROUPS, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.conv_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, C, H, W] and the time embedding [B, E] to [B, C', H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        skip = self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x
        return skip + self.conv2(F.silu(self.norm2(h)))


class _Down(nn.Module):
    """Halves the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Up(nn.Module):
    """Doubles the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _DownLevel(nn.Module):
    """Residual blocks of one resolution, then half of it unless `last`; outputs become skips."""

    def __init__(self, resnets: Sequence[nn.Module], width: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if not last:
            self.downsamplers = nn.ModuleList([_Down(width)])

    def forward(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x, emb)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x


class _UpLevel(nn.Module):
    """Residual blocks that take a skip each, then twice the resolution unless `last`."""

    def __init__(self, resnets: Sequence[nn.Module], width: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if not last:
            self.upsamplers = nn.ModuleList([_Up(width)])

    def forward(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for resnet in self.resnets:
            x = resnet(torch.cat([x, skips.pop()], dim=1), emb)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


class AdaptiveBlock(nn.Module):
    """Transformer block whose norms and residuals follow the time embedding."""

    def __init__(self, width: int, heads: int, hidden: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width, hidden)
        self.adaLN_modulation = nn.Linear(embedding, 4 * width)
        self.adaLN_gate = nn.Linear(embedding, 2 * width)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, N, M] and the time embedding [B, E] to [B, N, M]."""
        emb = F.silu(emb)[:, None]
        shift1, scale1, shift2, scale2 = self.adaLN_modulation(emb).chunk(4, dim=-1)
        gate1, gate2 = self.adaLN_gate(emb).chunk(2, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class _Middle(nn.Module):
    """The transformer; the condition is added to its tokens."""

    def __init__(
        self, *, channels: int, condition: int, width: int, depth: int, heads: int, hidden: int,
        embedding: int, grid: tuple[int, int],
    ) -> None:
        super().__init__()
        self.mid_pos_emb = nn.Parameter(torch.zeros(1, width, *grid), requires_grad=False)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.mid_block = nn.ModuleList(
            AdaptiveBlock(width, heads, hidden, embedding) for _ in range(depth)
        )
        self.mid_cond_proj = nn.Linear(condition, width)
        self.mid_proj_in = nn.Linear(channels, width)
        self.mid_proj_out = nn.Linear(width, channels)

    def forward(self, x: Tensor, emb: Tensor, condition: Tensor, hidden: Tensor | None) -> Tensor:
        height, breadth = x.shape[2:]
        shown = self.mid_cond_proj(condition.movedim(1, -1))
        if hidden is not None:
            shown = torch.where(hidden[..., None], self.mask_token, shown)
        shown = F.interpolate(shown.movedim(-1, 1), size=(height, breadth), mode="nearest")
        tokens = to_grid(self.mid_proj_in(to_tokens(x)), height, breadth)
        tokens = to_tokens(add_positions(tokens, self.mid_pos_emb) + shown)
        for block in self.mid_block:
            tokens = block(tokens, emb)
        return to_grid(self.mid_proj_out(tokens), height, breadth)


class UViT(nn.Module):
    """Noisy values and a condition to the diffusion model's output.

    Args:
        channels: C.
        condition: D.
        patch: Pixels per side of the first convolution.
        widths: Channels of each level; levels halve the resolution.
        blocks: Residual blocks a level.
        down_before_middle: Halves the resolution once more for the transformer.
        middle_width, middle_depth, middle_heads, middle_hidden: Of the transformer.
        grid: (h, w) of its position table; others resize it.
    """

    def __init__(
        self, *, channels: int, condition: int, patch: int, widths: Sequence[int], blocks: int,
        down_before_middle: bool, middle_width: int, middle_depth: int, middle_heads: int,
        middle_hidden: int, grid: tuple[int, int],
    ) -> None:
        super().__init__()
        self.width, embedding = widths[0], 4 * widths[0]
        self.conv_in = nn.Conv2d(channels, widths[0], patch, stride=patch)
        self.time_embedding = _TimeEmbedding(widths[0], embedding)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        last, skips = widths[0], [widths[0]]
        for i, width in enumerate(widths):
            resnets = [ResnetBlock(width if j else last, width, embedding) for j in range(blocks)]
            bottom = i == len(widths) - 1
            self.down_blocks.append(_DownLevel(resnets, width, bottom))
            skips += [width] * (blocks if bottom else blocks + 1)
            last = width
        if down_before_middle:
            self.downsample_mid = _Down(last)
        self.mid_block = _Middle(
            channels=last, condition=condition, width=middle_width, depth=middle_depth,
            heads=middle_heads, hidden=middle_hidden, embedding=embedding, grid=grid,
        )
        if down_before_middle:
            self.upsample_mid = _Up(last)
        for i, width in reversed(list(enumerate(widths))):
            resnets = []
            for _ in range(blocks + 1):
                resnets.append(ResnetBlock(last + skips.pop(), width, embedding))
                last = width
            self.up_blocks.append(_UpLevel(resnets, width, last=i == 0))
        self.conv_norm_out = nn.GroupNorm(GROUPS, last)
        self.conv_out = nn.ConvTranspose2d(last, channels, patch, stride=patch)

    def forward(
        self, x: Tensor, t: Tensor, condition: Tensor, hidden: Tensor | None = None
    ) -> Tensor:
        """One denoising call; the arguments are those of `PatchedUNet`."""
        emb = self.time_embedding(time_features(t, self.width))
        x = self.conv_in(x)
        skips = [x]
        for level in self.down_blocks:
            x = level(x, emb, skips)
        if hasattr(self, "downsample_mid"):
            x = self.downsample_mid(x)
        x = self.mid_block(x, emb, condition, hidden)
        if hasattr(self, "upsample_mid"):
            x = self.upsample_mid(x)
        for level in self.up_blocks:
            x = level(x, emb, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
