"""A tokenizer of adaptive length: tokens in the order of what they are worth.

Registers read the whole picture and become the tokens; in training only the first k of them, k
drawn anew for every sample, reach the decoder (nested dropout, Rippel et al., arXiv 1402.0915; on
tokens, Bachmann et al., arXiv 2502.13967). So the first tokens learn to tell most, and any prefix
decodes: a modality spends as many tokens as it is worth.

Shapes: B batch, C channels, H, W pixels, h, w grid, R registers, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenizers_vq.product import ProductVQ
from tokenizers_vq.quantizers import Quantized
from tokenizers_vq.vqvae import VQVAE, VQConfig


class OrderedVQ(VQVAE):
    """Encoder, bottleneck and decoder around ordered tokens."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__(config)
        self.queries = nn.Parameter(0.02 * torch.randn(config.registers, config.width))
        self.places = nn.Parameter(0.02 * torch.randn(config.registers, config.width))
        self.absent = nn.Parameter(0.02 * torch.randn(config.width))

    def _features(self, x: Tensor) -> tuple[Tensor, int, int]:
        x = self._patches(x)
        batch, height, breadth = x.shape[:3]
        x = x.flatten(1, 2) + self._positions(height, breadth)
        x = torch.cat([self.queries.expand(batch, -1, -1), x], dim=1)
        for block in self.encoder:
            x = block(x)
        return x[:, : self.config.registers], height, breadth

    def _values(self, latents: Tensor, height: int, breadth: int) -> Tensor:
        batch = len(latents)
        patches = self._positions(height, breadth).expand(batch, -1, -1)
        x = torch.cat([latents + self.places.to(latents.dtype), patches], dim=1)
        for block in self.decoder:
            x = block(x)
        x = x[:, self.config.registers :]
        return self.head(self.norm(x).unflatten(1, (height, breadth))).float()

    def _kept(self, latents: Tensor, lengths: Tensor) -> Tensor:
        """The first `lengths` [B] latents of each sample; the others are absent."""
        order = torch.arange(self.config.registers, device=latents.device)
        kept = (order < lengths[:, None])[..., None]
        return torch.where(kept, latents, self.absent.to(latents.dtype))

    def forward(self, x: Tensor) -> tuple[Tensor, Quantized]:
        """Values [B, C, H, W] or ids [B, H, W] to reconstruction and codes of all registers."""
        features, height, breadth = self._features(x)
        quantized = self.quantizer(features)
        latents = quantized.latents
        if self.training:
            most = self.config.registers + 1
            lengths = torch.randint(1, most, (len(x),), device=latents.device)
            latents = self._kept(latents, lengths)
        return self._values(latents, height, breadth), quantized

    def encode(self, x: Tensor) -> Tensor:
        """Values [B, C, H, W] or ids [B, H, W] to tokens int64 [B, R], the most telling first."""
        return self.quantizer(self._features(x)[0]).tokens

    def decode(self, tokens: Tensor) -> Tensor:
        """The first 1 to R tokens [B, k] to values [B, C, H, W] at the native size, or logits."""
        registers, (batch, count) = self.config.registers, tokens.shape
        latents = self.quantizer.lookup(nn.functional.pad(tokens, (0, registers - count)))
        latents = self._kept(latents, torch.full((batch,), count, device=tokens.device))
        return self._values(latents, self.config.grid, self.config.grid)


def build_network(config: VQConfig) -> VQVAE:
    """The network of a configuration: tokens on a grid, ordered ones, or those of a vector."""
    if config.groups:
        return ProductVQ(config)
    return OrderedVQ(config) if config.registers else VQVAE(config)
