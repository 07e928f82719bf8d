"""A released tokenizer as one network: encoder, bottleneck, decoder or diffusion decoder.

Shapes: B batch, C channels, H, W pixels, D latent width, h, w grid, K codebooks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenizers_vq.diffusion import Diffusion
from tokenizers_vq.quantizers import Quantized
from tokenizers_vq.released.codebooks import Memcodes, MovingCodebook
from tokenizers_vq.released.unet import PatchedUNet
from tokenizers_vq.released.uvit import UViT
from tokenizers_vq.released.vit import BottleneckMLP, ViTDecoder, ViTEncoder
from tokenizers_vq.vqvae import take_encoder


@dataclass(frozen=True, kw_only=True)
class ReleasedShape:
    """What a tokenizer's users ask about its network, and what it was built from."""

    vocab_size: int
    """Codes of a codebook."""
    channels: int
    """Channels of the values."""
    patch: int
    """Pixels per token and side."""
    grid: int
    """Tokens per side at the native size; 1 for single vectors."""
    codebooks: int
    """Tokens of a cell; above 1 they are all tokens of a sample."""
    num_classes: int
    """Above 0 the values are class ids in and logits out."""
    published: dict[str, Any] = field(default_factory=dict)
    """The published configuration."""
    head_width: int = 64
    """Channels per attention head."""

    @property
    def num_tokens(self) -> int:
        """Tokens of a sample at the native size."""
        return self.codebooks * self.grid**2

    def token_shape(self, count: int) -> tuple[int, ...]:
        """The shape in which the network takes `count` tokens of a sample.

        Raises:
            ValueError: if there is none.
        """
        if self.codebooks > 1:
            if count != self.num_tokens:
                raise ValueError(f"{count} tokens instead of {self.num_tokens}")
            return self.codebooks, self.grid, self.grid
        side = math.isqrt(count)
        if side * side != count:
            raise ValueError(f"{count} tokens do not form a square grid")
        return side, side

    def to_dict(self) -> dict[str, Any]:
        """What rebuilds the network beside its tensors, as JSON-ready values."""
        return {"published": self.published, "head_width": self.head_width}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a diffusion decoder turns noise into values."""

    steps: int = 50
    """Calls of the network."""
    seed: int = 0
    """Of the starting noise; every sample of a batch starts from the same."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 calls the network once a step."""
    eta: float = 0.0
    """0 is deterministic DDIM, 1 adds as much noise as DDPM."""


class ReleasedVQ(nn.Module):
    """VQ, VQ-VAE or DiVAE under the published parameter names.

    Args:
        shape: Sizes its users ask about.
        encoder: Values to features.
        quantize: The bottleneck.
        latent: D.
        features: Widths of the encoder's and the decoder's features.
        decoder: None where the checkpoint holds only an encoder.
        diffusion: What a decoder that denoises was trained for.
    """

    frozen = False
    decoding: tuple[str, ...] = ("decoder.", "post_quant_proj.")
    """Parameters that stand behind the codes."""

    def __init__(
        self, shape: ReleasedShape, *, encoder: ViTEncoder | BottleneckMLP,
        quantize: MovingCodebook | Memcodes, latent: int, features: tuple[int, int],
        decoder: nn.Module | None,
        diffusion: Diffusion | None = None,
    ) -> None:
        super().__init__()
        self.config, self.diffusion, self.sampling = shape, diffusion, Sampling()
        if shape.num_classes:
            self.cls_emb = nn.Embedding(shape.num_classes, shape.channels)
        self.encoder = encoder
        self.quant_proj = nn.Conv2d(features[0], latent, 1)
        self.quantize = quantize
        if decoder is not None:
            self.decoder = decoder
            if diffusion is None:
                self.post_quant_proj = nn.Conv2d(latent, features[1], 1)

    def latents(self, x: Tensor) -> Tensor:
        """Values [B, C, H, W] or class ids [B, H, W] to latents [B, D, h, w]."""
        if self.config.num_classes:
            ids = x.long()  # classes that it does not know are unlabelled, which is number 0
            x = self.cls_emb(ids.where(ids < self.config.num_classes, 0)).movedim(-1, 1)
        return self.quant_proj(self.encoder(x))

    def encode(self, x: Tensor) -> Tensor:
        """Values or class ids to tokens int64 [B, h, w], or [B, K, h, w] of memcodes."""
        return self.quantize(self.latents(x)).tokens

    def forward(
        self, x: Tensor, noise: Tensor | None = None, t: Tensor | None = None,
        hidden: Tensor | None = None, clean: Tensor | None = None,
    ) -> tuple[Tensor, Quantized]:
        """Values to their reconstruction (logits for classes) and codes.

        A diffusion decoder answers to x_t instead of x, made of `noise` [B, C, H, W] at steps
        `t` [B] with the codes not shown where `hidden` [B, h, w]. `clean` is what `clean(x)` gave,
        where that is known.
        """
        quantized = self.quantize(self.latents(x))
        if self.diffusion is None:
            return self._plain(quantized.latents), quantized
        assert noise is not None
        assert t is not None
        xt = self.diffusion.noisy(self.clean(x) if clean is None else clean, noise, t)
        return self.denoise(xt, t, quantized.latents, hidden), quantized

    def clean(self, x: Tensor) -> Tensor:
        """What noise is added to: the values themselves."""
        return x

    def take_encoder(self, source: nn.Module) -> None:
        """Takes over everything up to the codes from a trained network, and freezes it.

        Raises:
            ValueError: if the two differ in more than their decoders.
        """
        take_encoder(self, source, self.decoding)
        self.frozen = True

    def train(self, mode: bool = True) -> ReleasedVQ:
        """A frozen bottleneck keeps its codes in training, too."""
        super().train(mode)
        if self.frozen:
            self.quantize.eval()
        return self

    def denoise(
        self, xt: Tensor, t: Tensor, latents: Tensor, hidden: Tensor | None = None
    ) -> Tensor:
        """One call of the diffusion decoder.

        Args:
            xt: Noisy values [B, C, H, W].
            t: Diffusion steps int64 [B].
            latents: Quantised latents [B, D, h, w].
            hidden: bool [B, h, w], True where they are not shown.
        """
        return cast("PatchedUNet | UViT", self.decoder)(xt, t, latents, hidden)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens as `encode` gives them to values float32 [B, C, H, W] or logits.

        Raises:
            ValueError: if the checkpoint has no decoder.
        """
        if not hasattr(self, "decoder"):
            raise ValueError("the checkpoint holds an encoder only: it cannot decode")
        latents = self.quantize.lookup(tokens)
        if self.diffusion is None:
            return self._plain(latents).float()
        return self._sampled(latents).float()

    def _plain(self, latents: Tensor) -> Tensor:
        return cast("ViTDecoder | BottleneckMLP", self.decoder)(self.post_quant_proj(latents))

    def _sampled(self, latents: Tensor) -> Tensor:
        assert self.diffusion is not None
        options = self.sampling
        generator = torch.Generator().manual_seed(options.seed)
        noise = torch.randn(self.noise_shape(latents), generator=generator)
        noise = noise.to(latents.device).expand(len(latents), -1, -1, -1)

        def denoise(xt: Tensor, t: Tensor) -> Tensor:
            output = self.denoise(xt, t, latents)
            if options.guidance == 1:
                return output
            return torch.lerp(self.unguided(xt, t, latents), output, options.guidance)

        return self.walk(denoise, noise, generator)

    def walk(
        self, denoise: Callable[[Tensor, Tensor], Tensor], noise: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """From noise to what is decoded, by DDIM."""
        assert self.diffusion is not None
        return self.diffusion.sample(
            denoise, noise, steps=self.sampling.steps, eta=self.sampling.eta, generator=generator
        )

    def unguided(self, xt: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        """What guidance leads away from: an answer that no code was shown for."""
        batch, _, height, breadth = latents.shape
        hidden = torch.ones(batch, height, breadth, dtype=torch.bool, device=latents.device)
        return self.denoise(xt, t, latents, hidden)

    def noise_shape(self, latents: Tensor) -> tuple[int, ...]:
        """Of the noise that sampling begins with, for one sample."""
        height, breadth = latents.shape[2:]
        patch = self.config.patch
        return 1, self.config.channels, height * patch, breadth * patch
