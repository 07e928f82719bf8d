"""Stable Diffusion's autoencoder of pictures, under the parameter names of published files.

After latent diffusion (Rombach et al., arXiv 2112.10752). Shapes: B batch, H, W pixels, C latent
channels, h, w cells of the latents: H / 8 and W / 8 in Stable Diffusion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vq.released.stable_parts import (
    GROUPS,
    CrossAttention,
    Downsample,
    ResBlock,
    Upsample,
)

EPS = 1e-6
_LOG_VARIANCE = (-30.0, 20.0)


@dataclass(frozen=True, kw_only=True)
class AutoencoderSizes:
    """Sizes of the autoencoder; the defaults are those of Stable Diffusion 1."""

    latent: int = 4
    """C."""
    widths: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of each level, the finest first."""
    blocks: int = 2
    """Residual blocks of a level of the encoder; the decoder has one more."""

    @property
    def factor(self) -> int:
        """Pixels per cell and side."""
        return int(2 ** (len(self.widths) - 1))


class _Attention(CrossAttention):
    """Attention among all cells, behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1, bias=True)
        self.group_norm = nn.GroupNorm(GROUPS, width, EPS)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        return x + super().forward(tokens, context).transpose(1, 2).unflatten(2, x.shape[2:])


class _Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(width, width, eps=EPS) for _ in range(2))
        self.attentions = nn.ModuleList([_Attention(width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class _Level(nn.Module):
    def __init__(self, into: int, width: int, blocks: int, resample: str) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(width if i else into, width, eps=EPS) for i in range(blocks)
        )
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(width, padded=False)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(width)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        if hasattr(self, "downsamplers"):
            return self.downsamplers[0](x)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


class _Encoder(nn.Module):
    def __init__(self, sizes: AutoencoderSizes) -> None:
        super().__init__()
        widths, last = sizes.widths, len(sizes.widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _Level(widths[max(i - 1, 0)], width, sizes.blocks, "down" if i < last else "")
            for i, width in enumerate(widths)
        )
        self.mid_block = _Middle(widths[-1])
        self.conv_norm_out = nn.GroupNorm(GROUPS, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * sizes.latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class _Decoder(nn.Module):
    def __init__(self, sizes: AutoencoderSizes) -> None:
        super().__init__()
        widths, last = sizes.widths[::-1], len(sizes.widths) - 1
        self.conv_in = nn.Conv2d(sizes.latent, widths[0], 3, padding=1)
        self.mid_block = _Middle(widths[0])
        self.up_blocks = nn.ModuleList(
            _Level(widths[max(i - 1, 0)], width, sizes.blocks + 1, "up" if i < last else "")
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(GROUPS, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Autoencoder(nn.Module):
    """Pictures in [-1, 1] to latents and back; latents are not scaled here."""

    def __init__(self, sizes: AutoencoderSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder = _Encoder(sizes)
        self.decoder = _Decoder(sizes)
        self.quant_conv = nn.Conv2d(2 * sizes.latent, 2 * sizes.latent, 1)
        self.post_quant_conv = nn.Conv2d(sizes.latent, sizes.latent, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, H, W] to mean and deviation [B, C, h, w] of their latents."""
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(*_LOG_VARIANCE))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to pictures [B, 3, H, W]."""
        return self.decoder(self.post_quant_conv(latents))
