"""What a step of a 4M network costs, from its configuration alone.

D width, H hidden width of the MLP, N input and M target slots of a sample. Operations are the
matrix products' multiplications and additions (2 each); norms, softmax and look-ups are left out,
as in every published utilisation. With c = 3 matrices in a gated MLP, else 2:

    encoder layer   N (8 D^2 + 2c D H) + 4 D N^2
    context         2 N D^2
    decoder layer   M (12 D^2 + 2c D H) + 4 N D^2 + 4 D M^2 + 4 D M N
    inputs, heads   2 D times width or vocabulary, a slot

Activations are what autograd keeps between forward and backward with a fused attention kernel, see
`activation_bytes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from models.fourm.masking import Component, Mixture
from models.fourm.spec import FourMConfig

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T", float, "np.ndarray")

BACKWARD = 2.0
"""Operations of the backward pass, in forward passes."""


@dataclass(frozen=True)
class Load:
    """What passes through the network for one sample, on average."""

    inputs: float
    """Encoder slots, padding included."""
    targets: float
    """Decoder slots, padding included."""
    rows: Mapping[str, float] = field(default_factory=dict)
    """Slots with a loss, by target modality."""
    dense: Mapping[str, float] = field(default_factory=dict)
    """Slots of pixels or vectors, by modality."""

    @property
    def tokens(self) -> float:
        """Slots, as training budgets count them."""
        return self.inputs + self.targets


def expected_load(config: FourMConfig, mixture: Mixture) -> Load:
    """The load under the masks of `mixture` (full names): widths are what a batch has, shares of
    modalities are those of the concentrations, as if none ran out of tokens."""
    parts = mixture.components
    total = sum(part.weight for part in parts)
    shares = [part.weight / total for part in parts]
    rows: dict[str, float] = {}
    dense: dict[str, float] = {}
    for part, share in zip(parts, shares, strict=True):
        for name, count in _split(part.targets, sum(part.num_targets) / 2):
            rows[name] = rows.get(name, 0.0) + share * count
        for name, count in _split(part.inputs, sum(part.num_inputs) / 2):
            if not config.by_name[name].discrete:
                dense[name] = dense.get(name, 0.0) + share * count
    return Load(_width(mixture, shares, 0), _width(mixture, shares, 1), rows, dense)


def _width(mixture: Mixture, shares: list[float], kind: int) -> float:
    """Mean slots of a batch: of its component, or of the widest one where samples differ."""
    if not mixture.per_batch:
        return float(widest(mixture)[kind])
    return sum(share * _most(part)[kind]
               for share, part in zip(shares, mixture.components, strict=True))


def widest(mixture: Mixture) -> tuple[int, int]:
    """Most input and target slots that a batch can have."""
    most = [_most(part) for part in mixture.components]
    return max(one[0] for one in most), max(one[1] for one in most)


def _most(part: Component) -> tuple[int, int]:
    return part.num_inputs[1], part.num_targets[1]


def _split(alphas: Mapping[str, float], count: float) -> list[tuple[str, float]]:
    total = sum(alphas.values())
    return [(name, count * alpha / total) for name, alpha in alphas.items()]


def block_flops(config: FourMConfig, inputs: T, targets: T) -> T:
    """Operations of both stacks of blocks and the context in one forward pass, for samples of so
    many input and target slots: numbers, or arrays of them."""
    d, n, m = config.dim, inputs + config.num_register_tokens, targets
    mlp = (6 if config.gated_mlp else 4) * d * config.hidden
    encoder = n * (8 * d * d + 4 * n * d + mlp)
    decoder = m * (12 * d * d + 4 * m * d + 4 * n * d + mlp) + n * 4 * d * d
    return config.encoder_depth * encoder + config.decoder_depth * decoder + n * 2 * d * d


def forward_flops(config: FourMConfig, load: Load) -> float:
    """Operations of one forward pass with its loss, for one sample."""
    d = config.dim
    heads = sum(2 * d * config.by_name[name].vocab_size * count
                for name, count in load.rows.items())
    patches = sum(2 * d * config.by_name[name].dense_width * count
                  for name, count in load.dense.items())
    return block_flops(config, load.inputs, load.targets) + heads + patches


def train_flops(config: FourMConfig, load: Load) -> float:
    """Operations of forward and backward pass, for one sample."""
    return (1.0 + BACKWARD) * forward_flops(config, load)


def activation_bytes(
    config: FourMConfig, load: Load, *, compute_bytes: int = 2, recompute: bool = False
) -> float:
    """Bytes that one sample keeps for the backward pass.

    The residual stream is fp32, what enters matrix products and attention has `compute_bytes` (2
    for bf16). An encoder block keeps, per slot: the stream before both norms, both normed inputs,
    q, k, v, the attention's output twice (before and after its heads are joined), and four (two,
    without a gate) hidden vectors of the MLP; a decoder block one norm and one attention more, and
    keys and values of its context. Logits are kept in fp32.

    Args:
        config: The network.
        load: What passes through.
        compute_bytes: Bytes of a value in matrix products.
        recompute: Keep the inputs of blocks only and compute the rest again in the backward pass,
            which holds one block at a time.
    """
    d, h, c = config.dim, config.hidden, compute_bytes
    n, m = load.inputs + config.num_register_tokens, load.targets
    mlp = (4 if config.gated_mlp else 2) * h * c
    encoder = n * (2 * 4 * d + 2 * c * d + 5 * c * d + mlp)
    decoder = (m * (3 * 4 * d + 3 * c * d + 5 * c * d + 3 * c * d + mlp)
               + n * (c * d + 2 * c * d))
    logits = sum(4 * config.by_name[name].vocab_size * count for name, count in load.rows.items())
    ends = 4 * d * (3 * n + 3 * m) + logits
    if recompute:
        kept = 4 * d * (config.encoder_depth * n + config.decoder_depth * m)
        return ends + kept + max(encoder, decoder)
    return ends + config.encoder_depth * encoder + config.decoder_depth * decoder
