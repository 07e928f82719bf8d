"""Diffusion decoder on 4 x 4 patches: the UNet of Dhariwal & Nichol (arXiv 2105.05233).

Shapes: B batch, C channels, H, W pixels, h, w grid of the condition, D its width, E time embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32


def time_features(t: Tensor, width: int) -> Tensor:
    """Cosines, then sines of steps [B] at `width` / 2 falling frequencies, float32 [B, width]."""
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * (-math.log(10_000) * index / half).exp()
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    """Two convolutions; the time embedding is added between them."""

    def __init__(self, channels: int, out: int, embedding: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, out), nn.SiLU(), nn.Identity(), nn.Conv2d(out, out, 3, padding=1)
        )
        if channels != out:
            self.skip_connection = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, C, H, W] and the time embedding [B, E] to [B, C', H, W]."""
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        skip = self.skip_connection(x) if hasattr(self, "skip_connection") else x
        return skip + self.out_layers(h)


class SpatialAttention(nn.Module):
    """Self-attention of one head over all pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape; the time embedding is not used."""
        q, k, v = self.qkv(self.norm(x).flatten(2)).transpose(1, 2).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.proj_out(y).view(x.shape)


class Downsample(nn.Module):
    """Halves the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H / 2, W / 2]."""
        return self.op(x)


class Upsample(nn.Module):
    """Doubles the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, 2H, 2W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _First(nn.Conv2d):
    """A convolution that takes a time embedding like the other layers."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class _Layers(nn.ModuleList):
    """Layers run one after another."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb)
        return x


class PatchedUNet(nn.Module):
    """Noisy values and a condition to the diffusion model's output.

    Args:
        channels: C.
        condition: D.
        patch: Pixels per side folded into channels (c ph pw).
        width: Channels of the first level.
        multipliers: Channels of each level in units of `width`; levels halve the resolution.
        blocks: Residual blocks a level.
        attention_levels: Levels whose blocks are followed by attention.
    """

    def __init__(
        self, *, channels: int, condition: int, patch: int, width: int,
        multipliers: Sequence[int], blocks: int, attention_levels: Sequence[int],
    ) -> None:
        super().__init__()
        self.patch, self.width = patch, width
        embedding = 4 * width
        self.time_embed = nn.Sequential(
            nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        folded = channels * patch**2
        first = _First(folded + condition, width, 3, padding=1)
        self.input_blocks = nn.ModuleList([_Layers([first])])
        last, skips = width, [width]
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                layers: list[nn.Module] = [ResBlock(last, multiplier * width, embedding)]
                last = multiplier * width
                if level in attention_levels:
                    layers.append(SpatialAttention(last))
                self.input_blocks.append(_Layers(layers))
                skips.append(last)
            if level < len(multipliers) - 1:
                self.input_blocks.append(_Layers([Downsample(last)]))
                skips.append(last)
        self.middle_block = _Layers([
            ResBlock(last, last, embedding), SpatialAttention(last), ResBlock(last, last, embedding)
        ])
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for i in range(blocks + 1):
                layers = [ResBlock(last + skips.pop(), multiplier * width, embedding)]
                last = multiplier * width
                if level in attention_levels:
                    layers.append(SpatialAttention(last))
                if level and i == blocks:
                    layers.append(Upsample(last))
                self.output_blocks.append(_Layers(layers))
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, last), nn.SiLU(), nn.Conv2d(last, folded, 3, padding=1)
        )

    def forward(
        self, x: Tensor, t: Tensor, condition: Tensor, hidden: Tensor | None = None
    ) -> Tensor:
        """One denoising call.

        Args:
            x: x_t [B, C, H, W].
            t: Steps int64 [B].
            condition: [B, D, h, w].
            hidden: bool [B, h, w], True where the condition is not shown.
        """
        if hidden is not None:
            condition = condition.masked_fill(hidden[:, None], 0.0)
        emb = self.time_embed(time_features(t, self.width))
        x = F.pixel_unshuffle(x, self.patch)
        condition = F.interpolate(condition, size=x.shape[2:], mode="nearest")
        x = torch.cat([x, condition], dim=1)
        skips = []
        for block in self.input_blocks:
            x = block(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb)
        return F.pixel_shuffle(self.out(x), self.patch)
