"""What a 4M model is made of: its modalities and its network, as frozen configurations."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["img", "seq", "seq_emb", "pixels"]

PAD_ID, UNKNOWN_ID, SOS_ID, EOS_ID = 0, 1, 2, 3
SENTINEL_0 = 4
"""Id of [S_0]; span masking starts at [S_1]."""
NUM_SENTINELS = 200
CHUNKS = {"metadata": 2}
"""Tokens of the chunks of sequences that are made of independent facts."""
POSITION_ROWS = 512
"""Rows of the position table of every sequence in released checkpoints."""


@dataclass(frozen=True, kw_only=True)
class ModalitySpec:
    """One modality as the model sees it.

    `img` is a grid of discrete tokens predicted in any order, `seq` text tokens predicted from left
    to right, `pixels` image patches and `seq_emb` a sequence of feature vectors, both input only.
    """

    name: str
    """With its resolution where it has one, e.g. "tok_depth@128"."""
    kind: Kind
    max_tokens: int
    """Positions of the grid, or the longest sequence."""
    vocab_size: int = 0
    """Number of token ids of img and seq."""
    max_length: int = 0
    """seq: target positions from here on take position 0, as in released models; 0 = max_tokens."""
    chunk: int = 0
    """seq: tokens of a chunk, for sequences of independent facts (metadata: 2), whose chunks are
    shuffled and then shown or hidden whole; 0 masks token by token."""
    channels: int = 3
    """Channels of pixels, width of seq_emb vectors."""
    patch_size: int = 16
    """Side of a patch of pixels."""
    learned_positions: bool = False
    """Whether positions are learned (global descriptors) or sine-cosine tables."""
    is_input: bool = True
    is_target: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens <= 0:
            raise ValueError(f"{self.name}: max_tokens must be positive, got {self.max_tokens}")
        if self.discrete and self.vocab_size <= 0:
            raise ValueError(f"{self.name}: a {self.kind} modality needs a vocab_size")
        if not self.discrete and self.is_target:
            raise ValueError(f"{self.name}: {self.kind} can be an input only (is_target=False)")
        if self.kind == "seq" and self.max_tokens > POSITION_ROWS:
            raise ValueError(f"{self.name}: at most {POSITION_ROWS} tokens, got {self.max_tokens}")

    @property
    def discrete(self) -> bool:
        """Whether values are token ids."""
        return self.kind in ("img", "seq")

    @property
    def position_rows(self) -> int:
        """Rows of its position table."""
        return self.max_tokens if self.kind in ("img", "pixels") else POSITION_ROWS

    @property
    def position_limit(self) -> int:
        """First target position that wraps to 0."""
        return self.max_length or self.max_tokens

    @property
    def dense_width(self) -> int:
        """Values of one input vector of pixels or seq_emb; 0 for discrete modalities."""
        if self.kind == "pixels":
            return self.channels * self.patch_size**2
        return self.channels if self.kind == "seq_emb" else 0

    @property
    def grid(self) -> int:
        """Side of the square grid of img and pixels, in tokens."""
        return math.isqrt(self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class FourMConfig:
    """A 4M network. Raises ValueError for sizes that do not fit together."""

    modalities: tuple[ModalitySpec, ...]
    """Sorted by name at construction; a modality's index here is its id in a `Batch`."""
    dim: int = 256
    encoder_depth: int = 6
    decoder_depth: int = 6
    """0 for an encoder alone, which needs no targets."""
    num_heads: int = 4
    mlp_ratio: float = 4.0
    """MLP width over dim; a gated MLP has 2/3 of it."""
    gated_mlp: bool = True
    """SwiGLU instead of a GELU MLP."""
    bias: bool = False
    """Biases in norms, qkv, proj and MLP."""
    qk_norm: bool = False
    share_modality_embeddings: bool = True
    """One modality vector for encoder and decoder."""
    tie_embeddings: bool = True
    """The decoder's input embedding of a sequence is its output matrix."""
    num_register_tokens: int = 0
    token_std: float = field(default=0.02, compare=False)
    """Deviation of initial input token vectors. Position vectors have entries of about 0.7: beside
    them, tokens of 0.02, as released models began with, take long to be noticed."""
    loss: Literal["mod", "token", "token_by_vocab"] = "mod"
    """Mean over modalities of their mean token loss, or the plain mean over tokens. The last one
    weights a token by the size of its vocabulary, as the released code's `token` does by mistake:
    for repeating a run that was trained so. Recipes of released models use `mod`."""
    by_name: dict[str, ModalitySpec] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.modalities, key=lambda m: m.name))
        object.__setattr__(self, "modalities", ordered)
        object.__setattr__(self, "by_name", {m.name: m for m in ordered})
        if len(self.by_name) != len(ordered):
            raise ValueError("modality names must be unique")
        if not any(m.is_input for m in ordered) or not (self.targets or self.decoder_depth == 0):
            raise ValueError("a model needs at least one input and, unless it has no decoder, "
                             "one target modality")
        if self.dim % self.num_heads or self.dim % 4:
            raise ValueError(f"dim {self.dim} must be a multiple of num_heads and of 4")
        if self.loss not in ("mod", "token", "token_by_vocab"):
            raise ValueError(f"loss must be mod, token or token_by_vocab, got {self.loss!r}")

    @property
    def hidden(self) -> int:
        """Width of the MLP."""
        width = int(self.dim * self.mlp_ratio)
        return int(2 * width / 3) if self.gated_mlp else width

    @property
    def inputs(self) -> tuple[ModalitySpec, ...]:
        """Modalities the encoder takes."""
        return tuple(m for m in self.modalities if m.is_input)

    @property
    def targets(self) -> tuple[ModalitySpec, ...]:
        """Modalities the decoder predicts."""
        return tuple(m for m in self.modalities if m.is_target)

    def index(self, name: str) -> int:
        """Id of the modality `name` in a batch. Raises ValueError with the names there are."""
        if name not in self.by_name:
            raise ValueError(f"unknown modality {name!r}; the model has {', '.join(self.by_name)}")
        return list(self.by_name).index(name)
