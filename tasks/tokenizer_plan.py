"""What training tokenizers would take, without data or accelerator: shapes, sizes, hours.

The network is built on the meta device and one sample goes through it there, so that shapes and
operations are the real ones and nothing is allocated or computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from tasks.tokenizer_config import TokenizerRecipe

if TYPE_CHECKING:
    import torch

    from tasks.tokenizer_task import Network
    from tokenizers_vq.released.network import ReleasedVQ

FEATURES = {
    "clip": 512, "dinov2": 768, "imagebind": 1280, "dinov2_global": 768, "imagebind_global": 1280,
    "smpl_poses": 207,
}  # fmt: skip
"""Channels of the values that the released networks give; a labeler may give others."""
_CELLS = {"dinov2": 16, "imagebind": 16}
_BACKWARD = 3  # a training step costs three times its forward pass


@dataclass(frozen=True)
class TokenizerPlan:
    """What `plan_tokenizer` found."""

    name: str
    recipe: TokenizerRecipe
    parameters: int
    tokens: int
    """Tokens of a sample."""
    vocab_size: int
    tensors: dict[str, tuple[int, ...]]
    """Shape of every tensor that is stored."""
    output: tuple[int, ...]
    """Shape of what is decoded for one sample, without the batch."""
    flops: float
    """Operations of one sample through encoder, bottleneck and one call of the decoder."""

    @property
    def samples(self) -> int:
        """Samples that a training sees."""
        return self.recipe.steps * self.recipe.batch_size

    def hours(self, devices: int, peak_tflops: float, mfu: float) -> float:
        """Time of a training."""
        return _BACKWARD * self.flops * self.samples / (devices * peak_tflops * 1e12 * mfu) / 3600


def plan_tokenizer(name: str, recipe: TokenizerRecipe, channels: int = 0) -> TokenizerPlan:
    """Builds the network of a recipe without values; seconds on any machine.

    Args:
        name: Modality or recipe, which tells the channels of features.
        recipe: The recipe.
        channels: Of features or vectors; 0: those of the released networks.

    Raises:
        ValueError: the network cannot be built, or does not decode what it encodes.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tasks.tokenizer_task import build_network

    with torch.device("meta"):
        net = build_network(recipe.network(_example(name, recipe, channels)))
    net = net.to("meta").eval()
    values = _values(net)
    counter = FlopCounterMode(display=False)
    with torch.no_grad():
        tokens = net.encode(values)
        with counter:
            output = _answer(net, values)
        wanted = _wanted(net, values)
    if output.shape[-2:] != wanted.shape[-2:]:
        raise ValueError(f"{name}: {tuple(wanted.shape[1:])} decodes to {tuple(output.shape[1:])}")
    return TokenizerPlan(
        name, recipe, sum(value.numel() for value in net.parameters()), tokens[0].numel(),
        net.config.vocab_size,
        {key: tuple(value.shape) for key, value in net.state_dict().items()},
        tuple(output.shape[1:]), float(counter.get_total_flops()),
    )


def _example(name: str, recipe: TokenizerRecipe, channels: int) -> np.ndarray:
    base = next((known for known in sorted(FEATURES, key=len, reverse=True)
                 if name.startswith(known)), "")
    channels = channels or FEATURES.get(base, 0)
    if recipe.kind in ("feature", "vector") and not channels:
        raise ValueError(f"{name}: how many channels its {recipe.kind} values have is not known; "
                         f"those of {', '.join(FEATURES)} are")
    if recipe.kind == "vector":
        return np.zeros((1, channels), np.float32)
    if recipe.kind == "feature":
        side = _CELLS.get(base, 14)
        return np.zeros((1, side, side, channels), np.float16)
    return np.zeros((1, recipe.size, recipe.size), np.uint8)


def _values(net: Network) -> torch.Tensor:
    """One sample as the network eats it."""
    import torch

    config = net.config
    grid = config.grid * config.patch
    if config.num_classes:
        return torch.zeros(1, grid, grid, dtype=torch.uint8, device="meta")
    return torch.zeros(1, config.channels, grid, grid, device="meta")


def _answer(net: Network, values: torch.Tensor) -> torch.Tensor:
    """What one pass through the whole network gives out."""
    import torch

    if getattr(net, "diffusion", None) is None:
        return net(values)[0]
    step = torch.zeros(1, dtype=torch.int64, device="meta")
    return net(values, torch.zeros_like(_wanted(net, values)), step)[0]


def _wanted(net: Network, values: torch.Tensor) -> torch.Tensor:
    """What the network is to give out: the values, or what it makes of them for itself."""
    if getattr(net, "diffusion", None) is None:
        return values
    return cast("ReleasedVQ", net).clean(values)


def plan_lines(
    plans: Mapping[str, TokenizerPlan], devices: int = 8, peak_tflops: float = 312.0,
    mfu: float = 0.4,
) -> Iterator[str]:
    """The plans for a terminal, a line each."""
    yield (f"{'recipe':18} {'network':8} {'parameters':>12} {'tokens':>6} {'codes':>6} "
           f"{'bits':>6} {'steps':>8} {'batch':>5} {'lr':>8} {'samples':>8} {'hours':>7}")
    for name, plan in plans.items():
        recipe = plan.recipe
        bits = plan.tokens * float(np.log2(plan.vocab_size))
        yield (f"{name:18} {recipe.architecture:8} {plan.parameters:12,} {plan.tokens:6} "
               f"{plan.vocab_size:6} {bits:6.0f} {recipe.steps:8,} {recipe.batch_size:5} "
               f"{recipe.lr:8.2g} {plan.samples / 1e6:7.1f}M "
               f"{plan.hours(devices, peak_tflops, mfu):7.1f}")
    yield (f"hours on {devices} devices of {peak_tflops:g} TFLOP/s at {mfu:.0%} utilisation, "
           "without reading, labelling or perceptual networks")
