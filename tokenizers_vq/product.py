"""A tokenizer of whole-image vectors: one vector becomes several tokens that share it out.

Each token is the code of a part of its own, a linear view of what the encoder makes of the vector
(product quantisation with learned parts; the released tokenizers of global vectors do the same by
memcodes). All tokens are needed to decode, and they have places, but no order.

Shapes: B batch, C channels, G groups, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from tokenizers_vq.vqvae import VQVAE, VQConfig


class ProductVQ(VQVAE):
    """Encoder, bottleneck and decoder around the tokens of a vector [B, C, 1, 1]."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__(config)
        self.split = nn.Linear(config.width, config.groups * config.width)
        self.join = nn.Linear(config.groups * config.width, config.width)

    def _features(self, x: Tensor) -> tuple[Tensor, int, int]:
        features, height, breadth = super()._features(x)
        return self.split(features[:, 0]).unflatten(1, (self.config.groups, -1)), height, breadth

    def _values(self, latents: Tensor, height: int, breadth: int) -> Tensor:
        return super()._values(self.join(latents.flatten(1))[:, None], height, breadth)

    def encode(self, x: Tensor) -> Tensor:
        """Vectors [B, C, 1, 1] to tokens int64 [B, G]."""
        return self.quantizer(self._features(x)[0]).tokens

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, G] to vectors float32 [B, C, 1, 1]."""
        return self._values(self.quantizer.lookup(tokens), 1, 1)
