"""What the one trainer needs to know about a learned tokenizer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np

from infra.store import Store
from tasks.task import Task
from tasks.tokenizer_recipes import TokenizerRecipe

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tokenizers_vq.codec import ValueCodec
    from tokenizers_vq.vqvae import VQVAE, VQConfig

_CALIBRATION = 24  # batches


class ReconstructionTask(Task):
    """Reconstructs the values of its modality; with `start`, behind the codes of that network."""

    def __init__(
        self, recipe: TokenizerRecipe, network: VQConfig, codec: ValueCodec, train: np.ndarray,
        start: VQVAE | None = None,
    ) -> None:
        from tokenizers_vq.losses import reconstruction_loss

        self.recipe, self.network, self.codec, self.train = recipe, network, codec, train
        self.start = start
        self.reconstruction = reconstruction_loss(codec.kind, recipe.loss)
        self._perceptual: nn.Module | None = None

    def build_model(self) -> nn.Module:
        """A fresh network, behind the encoder of `start` where there is one."""
        from tokenizers_vq.ordered import build_network

        net = build_network(self.network)
        if self.start is not None:
            net.take_encoder(self.start)
        return net

    def batch(self, step: int, rank: int, world: int) -> torch.Tensor:
        """Values of the crops drawn for this step, as the network eats them."""
        rng = np.random.default_rng((self.recipe.seed, step))
        rows = rng.integers(0, len(self.train), self.recipe.batch_size)[rank::world]
        values = self.codec.to_tensor(self.train[rows])
        return resized(values, int(rng.choice(self.recipe.sizes))) if self.recipe.sizes else values

    def loss(
        self, model: nn.Module, batch: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Reconstruction plus the bottleneck's own loss."""
        output, quantized = model(batch)
        total = self.reconstruction(output, batch) + quantized.loss
        if not self.recipe.perceptual:
            return total, {}
        seen = self._seen(batch.device)(output, batch)
        return total + self.recipe.perceptual * seen, {"perceptual": seen.detach()}

    def _seen(self, device: torch.device) -> nn.Module:
        if self._perceptual is None:
            from tokenizers_vq.losses import Perceptual

            self._perceptual = Perceptual(self.recipe.perceptual_model).to(device)
        return self._perceptual

    def is_hidden(self, name: str) -> bool:
        """Muon updates patch projections too: halves the error that AdamW leaves there."""
        return name.startswith(("encoder.", "decoder.", "stem.", "head."))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Measures the bottleneck's statistics; quality is measured on the stored tokenizer."""
        net = cast("VQVAE", model)
        device = net.positions.device
        net.calibrate(self.batch(step, 0, 1).to(device) for step in range(_CALIBRATION))
        return {}


def reconstruction_task(
    store: Store, name: str, recipe: TokenizerRecipe, train: np.ndarray
) -> ReconstructionTask:
    """The task of a recipe on packed training values.

    Raises:
        FileNotFoundError: if `recipe.encoder` is not stored.
        ValueError: if it is another modality's, or a released network.
    """
    from tokenizers_vq.tokenizer import load_tokenizer
    from tokenizers_vq.vqvae import VQVAE

    if not recipe.encoder:
        return ReconstructionTask(recipe, recipe.resolved(train), recipe.codec(train), train)
    start = load_tokenizer(store, recipe.encoder)
    if start.modality != name or not isinstance(start.net, VQVAE):
        raise ValueError(f"encoder={recipe.encoder!r} is no {name} tokenizer trained here")
    network = replace(start.net.config, decoder_depth=recipe.decoder_depth)
    return ReconstructionTask(recipe, network, start.codec, train, start.net)


def resized(values: torch.Tensor, size: int) -> torch.Tensor:
    """Values [B, C, H, W] or ids [B, H, W] at another side in pixels; ids are not mixed."""
    import torch.nn.functional as F

    if values.dim() == 3:
        return F.interpolate(values[:, None], size=(size, size), mode="nearest")[:, 0]
    return F.interpolate(values, size=(size, size), mode="bilinear", antialias=True)
