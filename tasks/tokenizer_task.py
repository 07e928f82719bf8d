"""What the one trainer needs to know about a learned tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from infra.store import Store
from tasks.task import Task
from tasks.tokenizer_config import TokenizerRecipe

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tokenizers_vq.codec import ValueCodec
    from tokenizers_vq.diffusion import Diffusion
    from tokenizers_vq.released.design import ReleasedDesign
    from tokenizers_vq.released.network import ReleasedVQ
    from tokenizers_vq.vqvae import VQVAE, VQConfig

    Network = VQVAE | ReleasedVQ
    Measure = Callable[[Network], dict[str, float]]

_CALIBRATION = 24  # batches


class ReconstructionTask(Task):
    """Reconstructs the values of its modality; with `start`, behind the codes of that network, or
    where it left off."""

    def __init__(
        self, recipe: TokenizerRecipe, network: VQConfig | ReleasedDesign | None,
        codec: ValueCodec, train: np.ndarray, start: Network | None = None,
        measure: Measure | None = None,
    ) -> None:
        """The task of a recipe.

        Args:
            recipe: Loss, batches and schedule.
            network: What is built; None goes on with `start` itself.
            codec: The value contract.
            train: Packed values [N, H, W(, C)].
            start: A trained network.
            measure: Metrics of a network in evaluation mode, for the loss curve.
        """
        from tokenizers_vq.losses import reconstruction_loss

        self.recipe, self.network, self.codec, self.train = recipe, network, codec, train
        self.start, self.measure = start, measure
        self.reconstruction = reconstruction_loss(codec.kind, recipe.loss)

    def build_model(self) -> nn.Module:
        """A fresh network, behind the encoder of `start` where there is one; or `start` itself."""
        if self.network is None:
            assert self.start is not None
            return copy.deepcopy(self.start)
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
        from tokenizers_vq.quantizers import perplexity

        pred, target, quantized, vocab_size = self._answer(model, batch)
        fit = self.reconstruction(pred, target)
        seen = {
            "reconstruction": fit.detach(), "bottleneck": quantized.loss.detach(),
            "perplexity": perplexity(quantized.tokens, vocab_size),
        }  # fmt: skip
        total = fit + quantized.loss
        if not self.recipe.perceptual:
            return total, seen
        distance = self.perceptual.to(batch.device)(pred, target)
        return total + self.recipe.perceptual * distance, {
            **seen, "perceptual": distance.detach()
        }  # fmt: skip

    def _answer(
        self, model: nn.Module, batch: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Any, int]:
        """Prediction, what it should be, the codes, and how many there are."""
        import torch

        net = cast("Network", getattr(model, "module", model))  # below DDP, for its sizes alone
        vocab_size = net.config.vocab_size
        diffusion: Diffusion | None = getattr(net, "diffusion", None)
        if diffusion is None:
            output, quantized = model(batch)
            return output, batch, quantized, vocab_size
        # Of a decoder in latents, those; for values themselves otherwise.
        clean = cast("ReleasedVQ", net).clean(batch)
        noise = torch.randn_like(clean)
        t = torch.randint(0, diffusion.steps, (len(batch),), device=batch.device)
        output, quantized = model(batch, noise, t, self._hidden(batch, net.config.patch), clean)
        pred, target = diffusion.compared(output.float(), clean, noise, t)
        return pred, target, quantized, vocab_size

    def _hidden(self, batch: torch.Tensor, patch: int) -> torch.Tensor | None:
        """Which codes a diffusion decoder is not shown: all of a share of the samples."""
        import torch

        if not self.recipe.guidance_dropout:
            return None
        side = min(batch.shape[2], self.recipe.size) // patch  # pictures may be larger than seen
        cells = (len(batch), side, side)
        dropped = torch.rand(len(batch), 1, 1, device=batch.device) < self.recipe.guidance_dropout
        return dropped.expand(cells)

    @cached_property
    def perceptual(self) -> nn.Module:
        """The frozen network that pictures are compared with."""
        from tokenizers_vq.losses import perceptual_network

        return perceptual_network(self.recipe.perceptual_model)

    def is_hidden(self, name: str) -> bool:
        """Muon updates patch projections too: halves the error that AdamW leaves there."""
        return self.recipe.muon and self.recipe.light and name.startswith(
            ("encoder.", "decoder.", "stem.", "head.")
        )

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Measures the bottleneck's statistics, then the held-out samples."""
        from tokenizers_vq.vqvae import VQVAE

        net = cast("Network", model)
        if isinstance(net, VQVAE):
            device = net.positions.device
            net.calibrate(self.batch(step, 0, 1).to(device) for step in range(_CALIBRATION))
        return self.measure(net) if self.measure else {}


def build_network(network: VQConfig | ReleasedDesign) -> Network:
    """The network of a configuration or design, with fresh weights."""
    from tokenizers_vq import ordered
    from tokenizers_vq.vqvae import VQConfig

    return ordered.build_network(network) if isinstance(network, VQConfig) else network.build()


def reconstruction_task(
    store: Store, name: str, recipe: TokenizerRecipe, train: np.ndarray
) -> ReconstructionTask:
    """The task of a recipe on packed training values.

    Raises:
        FileNotFoundError: if `recipe.encoder` or `recipe.start` is not stored.
        ValueError: if it is another modality's, or its encoder does not fit the recipe.
    """
    from tokenizers_vq.tokenizer import load_tokenizer
    from tokenizers_vq.vqvae import VQConfig

    if recipe.architecture == "controlnet" and not recipe.encoder and not recipe.start:
        raise ValueError("a ControlNet learns behind the codes of a stored tokenizer: name it with "
                         "encoder='tokenizers/rgb@...'")
    if not recipe.encoder and not recipe.start:
        return ReconstructionTask(recipe, recipe.network(train), recipe.codec(train), train)
    given = recipe.encoder or recipe.start
    start = load_tokenizer(store, given)
    if start.modality != name:
        field = "encoder" if recipe.encoder else "start"
        raise ValueError(f"{field}={given!r} is a tokenizer of {start.modality}, not of {name}")
    if recipe.start:
        return ReconstructionTask(recipe, None, start.codec, train, start.net)
    network: VQConfig | ReleasedDesign = recipe.network(train)
    config = start.net.config
    if isinstance(config, VQConfig) != isinstance(network, VQConfig):
        raise ValueError(f"encoder={given!r} is of another family of networks than architecture="
                         f"{recipe.architecture!r}")
    if isinstance(config, VQConfig):
        network = replace(config, decoder_depth=recipe.decoder_depth)
    elif not isinstance(network, VQConfig) and recipe.picture:
        network = replace(network, stable_diffusion=recipe.stable_diffusion)
    return ReconstructionTask(recipe, network, start.codec, train, start.net)


def resized(values: torch.Tensor, size: int) -> torch.Tensor:
    """Values [B, C, H, W] or ids [B, H, W] at another side in pixels; ids are not mixed."""
    import torch.nn.functional as F

    if values.dim() == 3:
        return F.interpolate(values[:, None], size=(size, size), mode="nearest")[:, 0]
    return F.interpolate(values, size=(size, size), mode="bilinear", antialias=True)
