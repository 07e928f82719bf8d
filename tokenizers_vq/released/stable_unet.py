"""Stable Diffusion's UNet and a ControlNet beside it, under the parameter names of published files.

The ControlNet (Zhang et al., arXiv 2302.05543) is a copy of the UNet's first half that also sees a
condition; what it says is added to the UNet's skip connections. Shapes: B batch, C channels, h, w
cells of the latents, D condition width, N context tokens of width E.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vq.released.stable_parts import (
    GROUPS,
    Downsample,
    ResBlock,
    SpatialTransformer,
    TimeEmbedding,
    Upsample,
)

Residuals = tuple[list[Tensor], Tensor]
"""What is added to the skip connections, and to the middle."""


@dataclass(frozen=True, kw_only=True)
class UNetSizes:
    """Sizes of the UNet; the defaults are those of Stable Diffusion 1."""

    latent: int = 4
    """Channels of the latents."""
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    """Channels of each level, the finest first."""
    blocks: int = 2
    """Residual blocks of a level on the way down; on the way up one more."""
    attends: tuple[bool, ...] = (True, True, True, False)
    """Levels with attention."""
    context: int = 768
    """E, width of the text encoder's tokens."""
    heads: int = 8
    """Attention heads, which no tensor tells."""


class _Level(nn.Module):
    """Residual blocks, attention after each where the level attends, and a change of size."""

    def __init__(
        self, sizes: UNetSizes, level: int, channels_in: list[int], time: int,
        resample: str = "",
    ) -> None:
        super().__init__()
        width = sizes.widths[level]
        self.resnets = nn.ModuleList(ResBlock(each, width, time) for each in channels_in)
        self.attends = sizes.attends[level]
        if self.attends:
            self.attentions = nn.ModuleList(
                SpatialTransformer(width, sizes.heads, sizes.context) for _ in channels_in
            )
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(width)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(width)])

    def block(self, number: int, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """One residual block with its attention."""
        x = self.resnets[number](x, time)
        return self.attentions[number](x, context) if self.attends else x

    def down(self, x: Tensor, time: Tensor, context: Tensor) -> list[Tensor]:
        """All that the way up is to see again, the last one goes on."""
        seen = []
        for number in range(len(self.resnets)):
            x = self.block(number, x, time, context)
            seen.append(x)
        if hasattr(self, "downsamplers"):
            seen.append(self.downsamplers[0](x))
        return seen

    def up(self, x: Tensor, seen: list[Tensor], time: Tensor, context: Tensor) -> Tensor:
        """Takes its skip connections off the end of `seen`."""
        for number in range(len(self.resnets)):
            x = self.block(number, torch.cat([x, seen.pop()], dim=1), time, context)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


class _Middle(nn.Module):
    def __init__(self, sizes: UNetSizes, time: int) -> None:
        super().__init__()
        width = sizes.widths[-1]
        self.resnets = nn.ModuleList(ResBlock(width, width, time) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(width, sizes.heads, sizes.context)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, time), context)
        return self.resnets[1](x, time)


class _FirstHalf(nn.Module):
    """Everything down to the middle: what a UNet and its ControlNet have in common."""

    def __init__(self, sizes: UNetSizes) -> None:
        super().__init__()
        widths, time, last = sizes.widths, 4 * sizes.widths[0], len(sizes.widths) - 1
        self.conv_in = nn.Conv2d(sizes.latent, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0])
        self.down_blocks = nn.ModuleList(
            _Level(sizes, i, [widths[max(i - 1, 0)], *[widths[i]] * (sizes.blocks - 1)], time,
                   "down" if i < last else "")
            for i in range(len(widths))
        )
        self.mid_block = _Middle(sizes, time)

    def halfway(
        self, x: Tensor, time: Tensor, context: Tensor, condition: Tensor | float = 0.0
    ) -> tuple[list[Tensor], Tensor]:
        """All skip connections, and the middle."""
        x = self.conv_in(x) + condition
        seen = [x]
        for level in cast("Iterable[_Level]", self.down_blocks):
            seen += level.down(seen[-1], time, context)
        return seen, self.mid_block(seen[-1], time, context)


class LatentUNet(_FirstHalf):
    """The denoiser of Stable Diffusion."""

    def __init__(self, sizes: UNetSizes) -> None:
        super().__init__(sizes)
        widths, time, last = sizes.widths, 4 * sizes.widths[0], len(sizes.widths) - 1
        levels = []
        for i in range(last, -1, -1):
            before, after = widths[min(i + 1, last)], widths[max(i - 1, 0)]
            skips = [*[widths[i]] * sizes.blocks, after]
            into = [before, *[widths[i]] * sizes.blocks]
            channels = [a + b for a, b in zip(into, skips, strict=True)]
            levels.append(_Level(sizes, i, channels, time, "up" if i else ""))
        self.up_blocks = nn.ModuleList(levels)
        self.conv_norm_out = nn.GroupNorm(GROUPS, widths[0], 1e-5)
        self.conv_out = nn.Conv2d(widths[0], sizes.latent, 3, padding=1)

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, control: Residuals | None = None
    ) -> Tensor:
        """Noisy latents [B, C, h, w], steps [B] and context [B, N, E] to what is predicted."""
        time = self.time_embedding(t)
        seen, x = self.halfway(x, time, context)
        if control is not None:
            seen = [own + told for own, told in zip(seen, control[0], strict=True)]
            x = x + control[1]
        for level in cast("Iterable[_Level]", self.up_blocks):
            x = level.up(x, seen, time, context)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class _Condition(nn.Module):
    """The condition in the UNet's first width. Unlike in other ControlNets it has the side of the
    latents, so nothing shrinks."""

    def __init__(self, channels: int, widths: tuple[int, ...], out: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Conv2d(near, out, 3, padding=1)
            for near, far in pairwise(widths) for out in (near, far)
        )
        self.conv_out = nn.Conv2d(widths[-1], out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv_in(x))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNet(_FirstHalf):
    """What steers the UNet by a condition.

    Args:
        sizes: Of the UNet.
        condition: D.
        widths: Of the convolutions that read the condition.
    """

    def __init__(self, sizes: UNetSizes, condition: int, widths: tuple[int, ...]) -> None:
        super().__init__(sizes)
        self.controlnet_cond_embedding = _Condition(condition, widths, sizes.widths[0])
        last = len(sizes.widths) - 1
        told = [sizes.widths[0]]
        for i, width in enumerate(sizes.widths):
            told += [width] * (sizes.blocks + (i < last))
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(each, each, 1) for each in told)
        self.controlnet_mid_block = nn.Conv2d(sizes.widths[-1], sizes.widths[-1], 1)

    @torch.no_grad()
    def begin(self, unet: LatentUNet) -> None:
        """Starts as the UNet's first half that says nothing yet."""
        own = self.state_dict()
        self.load_state_dict(
            {name: value for name, value in unet.state_dict().items() if name in own}, strict=False
        )
        for layer in (self.controlnet_cond_embedding.conv_out, self.controlnet_mid_block,
                      *self.controlnet_down_blocks):
            for parameter in layer.parameters():
                parameter.zero_()

    def forward(self, x: Tensor, t: Tensor, context: Tensor, condition: Tensor) -> Residuals:
        """Noisy latents [B, C, h, w] and the condition [B, D, h, w] to what the UNet is told."""
        time = self.time_embedding(t)
        seen, middle = self.halfway(x, time, context, self.controlnet_cond_embedding(condition))
        layers = zip(self.controlnet_down_blocks, seen, strict=True)
        return [layer(each) for layer, each in layers], self.controlnet_mid_block(middle)
