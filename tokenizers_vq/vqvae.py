"""The learned tokenizer's network: a vision transformer on each side of a bottleneck.

A 128 px image becomes an 8 x 8 grid of tokens. Two strided convolutions patchify on the way in
and a small convolution at a quarter of the resolution smooths patch borders on the way out: at
the budgets of this project (a minute on two cores) they reach in a third of the steps what a
linear patch embedding needs. The encoder is shallow on purpose: a code that depends on its own
neighbourhood is one that a model can predict from another modality.

Shapes: B batch, C channels, H, W pixels, h, w grid, N = h * w tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vq.quantizers import Codebook, FiniteScalar, LookupFree, Quantized

_DECODING = ("decoder.", "norm.", "head.", "places", "absent", "join.")
"""Parameters that stand behind the codes."""


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """Shape of a tokenizer network."""

    channels: int
    """Channels of the values, or embedding width per class if `num_classes`."""
    image_size: int = 128
    """Pixels per side the positions are made for; other multiples of `patch` also work."""
    patch: int = 16
    """Pixels per token and side; 1 for feature maps."""
    num_classes: int = 0
    """Above 0 the values are class ids in and logits out."""
    width: int = 256
    """Transformer width."""
    encoder_depth: int = 1
    """Blocks before the bottleneck."""
    decoder_depth: int = 2
    """Blocks after the bottleneck."""
    heads: int = 4
    """Attention heads."""
    quantizer: str = "fsq"
    """`fsq`, `vq` or `lfq`."""
    levels: tuple[int, ...] = (8, 5, 5, 5)
    """FSQ levels; the vocabulary is their product."""
    codebook_size: int = 1024
    """Vocabulary of `vq` and `lfq`; ignored by `fsq`."""
    jitter: float = 0.0
    """Probability of moving a FSQ level by one in training."""
    registers: int = 0
    """Above 0 a sample has so many ordered tokens instead of a grid (`tokenizers_vq.ordered`)."""
    groups: int = 0
    """Above 0 a vector (a map of one cell) becomes so many tokens (`tokenizers_vq.product`)."""
    spread: float = 0.0
    """Weight of the loss that keeps all codes of `fsq` in use."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        if self.quantizer not in ("fsq", "vq", "lfq"):
            raise ValueError(f"quantizer={self.quantizer!r}: choose 'fsq', 'vq' or 'lfq'")
        if self.quantizer == "lfq" and self.codebook_size & (self.codebook_size - 1):
            raise ValueError(f"lfq: {self.codebook_size} codes are no power of two")
        for name in ("channels", "image_size", "patch", "width", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.registers < 0:
            raise ValueError(f"registers={self.registers} must not be negative")
        if self.groups < 0 or (self.groups and (self.registers or self.image_size > 1)):
            raise ValueError(f"groups={self.groups} is for vectors alone, without registers")
        if self.image_size % self.patch:
            raise ValueError(f"image_size={self.image_size} is not a multiple of {self.patch}")
        if self.width % (4 * self.heads):
            raise ValueError(f"width={self.width}: use a multiple of 4 * heads={4 * self.heads}")

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return self.image_size // self.patch

    @property
    def num_tokens(self) -> int:
        """Tokens of a sample at the native size."""
        return self.registers or self.groups or self.grid**2

    def token_shape(self, count: int) -> tuple[int, ...]:
        """The shape in which the network takes `count` tokens of a sample.

        Raises:
            ValueError: if there is none.
        """
        if self.registers:
            if not 1 <= count <= self.registers:
                raise ValueError(f"{count} tokens instead of 1 to {self.registers}")
            return (count,)
        if self.groups:
            if count != self.groups:
                raise ValueError(f"{count} tokens instead of {self.groups}")
            return (count,)
        side = math.isqrt(count)
        if side * side != count:
            raise ValueError(f"{count} tokens do not form a square grid")
        return side, side

    @property
    def vocab_size(self) -> int:
        """Number of codes."""
        return math.prod(self.levels) if self.quantizer == "fsq" else self.codebook_size

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values."""
        fields = {**asdict(self), "levels": list(self.levels)}
        for name in ("registers", "groups", "spread"):
            if not fields[name]:  # younger than stored tokenizers, whose bytes must not change
                del fields[name]
        return fields


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention over [B, heads, N, D / heads].

    For gradients on a CPU the products are written out: with 64 tokens in bf16 their backward
    pass takes 4 ms where that of the fused kernel takes 23 ms. The kernel serves all else.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled():
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return weights.softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    """Pre-norm transformer block on [B, N, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to the same shape."""
        b, n, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        x = x + self.proj(attended)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def sincos_positions(width: int, height: int, breadth: int, base: int) -> Tensor:
    """Fixed 2-D sine-cosine positions [height * breadth, width].

    Cell centres are measured on a grid of `base` cells per side, so that a larger or smaller
    grid interpolates the same function.
    """
    frequencies = 1.0 / 10_000 ** (torch.arange(width // 4) / (width // 4))

    def axis(count: int) -> Tensor:
        centres = (torch.arange(count) + 0.5) * base / count - 0.5
        angles = centres[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    rows = axis(height)[:, None].expand(height, breadth, width // 2)
    columns = axis(breadth)[None].expand(height, breadth, width // 2)
    return torch.cat([rows, columns], dim=2).reshape(height * breadth, width)


class Stem(nn.Module):
    """Values [B, C, H, W] to tokens [B, h, w, D], patches laid out (c ph pw)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.proj = nn.Linear(config.channels * config.patch**2, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, h, w, D]."""
        return self.proj(F.pixel_unshuffle(x, self.patch).permute(0, 2, 3, 1))


class Head(nn.Module):
    """Decoder features [B, h, w, D] to values [B, C, H, W], patches laid out (c ph pw)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.patch = config.patch
        out = config.num_classes or config.channels
        self.proj = nn.Linear(config.width, out * config.patch**2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, D] to [B, C, H, W]."""
        return F.pixel_shuffle(self.proj(x).permute(0, 3, 1, 2), self.patch)


def take_encoder(net: nn.Module, source: nn.Module, decoding: tuple[str, ...]) -> None:
    """Gives a network all parameters of another but those whose names begin with `decoding`, and
    lets only these be trained.

    Raises:
        ValueError: if the two differ in more than `decoding`.
    """
    kept = {name: value for name, value in source.state_dict().items()
            if not name.startswith(decoding)}
    own = {name: value.shape for name, value in net.state_dict().items()
           if not name.startswith(decoding)}
    if own != {name: value.shape for name, value in kept.items()}:
        raise ValueError("the encoder of another network does not fit this one")
    net.load_state_dict(kept, strict=False)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith(decoding) and parameter.requires_grad)


class VQVAE(nn.Module):
    """Encoder, bottleneck and decoder of one modality."""

    positions: Tensor
    quantizer: FiniteScalar | Codebook | LookupFree
    frozen = False

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        if config.num_classes:
            self.classes = nn.Parameter(torch.randn(config.num_classes, config.channels))
        self.stem = Stem(config)
        self.encoder = nn.ModuleList(
            Block(width, config.heads) for _ in range(config.encoder_depth)
        )
        if config.quantizer == "fsq":
            self.quantizer = FiniteScalar(width, config.levels, config.jitter, config.spread)
        elif config.quantizer == "vq":
            self.quantizer = Codebook(width, config.codebook_size)
        else:
            self.quantizer = LookupFree(width, config.codebook_size)
        self.decoder = nn.ModuleList(
            Block(width, config.heads) for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = Head(config)
        positions = sincos_positions(width, config.grid, config.grid, config.grid)
        self.register_buffer("positions", positions, persistent=False)

    def take_encoder(self, source: nn.Module) -> None:
        """Takes over everything up to the codes from a trained network, and freezes it.

        Raises:
            ValueError: if the two differ in more than their decoders.
        """
        take_encoder(self, source, _DECODING)
        self.frozen = True

    def train(self, mode: bool = True) -> VQVAE:
        """A frozen bottleneck keeps its statistics and codes in training, too."""
        super().train(mode)
        if self.frozen:
            self.quantizer.eval()
        return self

    def _positions(self, height: int, breadth: int) -> Tensor:
        base = self.config.grid
        if (height, breadth) == (base, base):
            return self.positions
        table = sincos_positions(self.config.width, height, breadth, base)
        return table.to(self.positions.device)

    def _patches(self, x: Tensor) -> Tensor:
        """Values or ids to patch embeddings [B, h, w, D]."""
        if self.config.num_classes:
            # A product with one-hot rows instead of a gather: its gradient is a product too,
            # where a gather's would add pixel by pixel. Ids out of range (255) embed as zero.
            ids = torch.arange(self.config.num_classes, device=x.device)
            x = (x[:, :, :, None] == ids).to(self.classes.dtype) @ self.classes
            x = x.permute(0, 3, 1, 2)
        return self.stem(x)

    def _features(self, x: Tensor) -> tuple[Tensor, int, int]:
        """What goes into the bottleneck, [B, N, D], and the grid."""
        x = self._patches(x)
        height, breadth = x.shape[1:3]
        x = x.flatten(1, 2)
        # No positions before the bottleneck: a code then means the same wherever it stands.
        for block in self.encoder:
            x = block(x)
        return x, height, breadth

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Measures the bottleneck's statistics on training batches; due after every training."""
        if isinstance(self.quantizer, FiniteScalar) and not self.frozen:
            self.quantizer.calibrate(self._features(x)[0] for x in batches)

    def _values(self, latents: Tensor, height: int, breadth: int) -> Tensor:
        x = latents + self._positions(height, breadth)
        for block in self.decoder:
            x = block(x)
        return self.head(self.norm(x).unflatten(1, (height, breadth))).float()

    def forward(self, x: Tensor) -> tuple[Tensor, Quantized]:
        """Values [B, C, H, W] (ids [B, H, W] for classes) to reconstruction and codes."""
        features, height, breadth = self._features(x)
        quantized = self.quantizer(features)
        return self._values(quantized.latents, height, breadth), quantized

    def encode(self, x: Tensor) -> Tensor:
        """Values [B, C, H, W] or class ids [B, H, W] to tokens int64 [B, h, w]."""
        features, height, breadth = self._features(x)
        return self.quantizer(features).tokens.unflatten(1, (height, breadth))

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, h, w] to values float32 [B, C, H, W], or logits for classes."""
        height, breadth = tokens.shape[1:]
        return self._values(self.quantizer.lookup(tokens.flatten(1)), height, breadth)
