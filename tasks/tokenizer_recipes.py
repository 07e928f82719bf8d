"""Recipes of tokenizers: network, value contract and training budget in one frozen object.

`tokenizer_recipe("depth")` is the recipe of the embedded world: 128 px, 64 tokens. About a minute
of one core each; a network for photographs takes the same recipe with more steps, a wider
network and other levels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from models import modalities
from models.crops import CropPolicy

if TYPE_CHECKING:
    import numpy as np

    from tasks.train_config import TrainConfig
    from tokenizers_vq.codec import ValueCodec
    from tokenizers_vq.vqvae import VQConfig

Kind = Literal["rgb", "depth", "normal", "semseg", "feature", "vector", "edge", "mask"]
_ADDED = frozenset({
    "loss", "perceptual", "perceptual_model", "sizes", "registers", "encoder", "groups", "words",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TokenizerRecipe:
    """Everything that decides what a learned tokenizer becomes."""

    kind: Kind
    """Value type: decides contract, metric and, unless named, the loss."""
    size: int = 128
    """Side of the crops in pixels."""
    patch: int = 16
    """Pixels per token and side; ignored by feature maps, whose cells are the tokens."""
    levels: tuple[int, ...] = (8, 5, 5, 5)
    """FSQ levels; the vocabulary is their product."""
    quantizer: Literal["fsq", "vq", "lfq"] = "fsq"
    """Bottleneck; `vq` and `lfq` take as many codes as `levels` multiply to."""
    width: int = 256
    """Transformer width."""
    encoder_depth: int = 1
    """Blocks before the bottleneck."""
    decoder_depth: int = 2
    """Blocks after the bottleneck."""
    jitter: float = 0.0
    """Probability of moving an FSQ level by one in training."""
    num_classes: int = 0
    """Classes of semseg; 0 takes the largest id of the training labels."""
    depth_mode: Literal["log", "standardise"] = "log"
    """Depth in metric units keeps its scale under `log`."""
    steps: int = 500
    """Optimizer steps."""
    batch_size: int = 32
    """Crops a step."""
    lr: float = 1e-2
    """Peak learning rate; Muon for hidden matrices, AdamW for the rest."""
    min_scale: float = 0.8
    """Least share of the image that a training crop covers."""
    max_samples: int = 4000
    """Crops kept in memory."""
    seed: int = 0
    """Seed of weights and batches."""
    loss: str = ""
    """`mse`, `l1`, `smooth_l1`, `cosine`, `cross_entropy` or `bce`; empty takes the kind's own."""
    perceptual: float = 0.0
    """Weight of the distance between what a frozen network sees in pictures; rgb only."""
    perceptual_model: str = "vit_base_patch16_clip_224.openai"
    """That network, a timm model."""
    sizes: tuple[int, ...] = ()
    """Sides in pixels of which each step draws one; empty trains at `size` alone."""
    registers: int = 0
    """Above 0 a sample becomes so many ordered tokens, of which any first few decode."""
    groups: int = 0
    """Tokens of a vector; 0 is one. For `vector` alone."""
    encoder: str = ""
    """Folder of a stored tokenizer: its codes are kept, and only a new decoder of `decoder_depth`
    blocks is trained; all else of the network is its own."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if self.steps < 1 or self.batch_size < 1 or self.max_samples < 1:
            raise ValueError("steps, batch_size and max_samples must be positive")
        if self.perceptual and self.kind != "rgb":
            raise ValueError(f"perceptual={self.perceptual} is for rgb, not for {self.kind}")
        if self.groups and self.kind != "vector":
            raise ValueError(f"groups={self.groups} is for vectors, not for {self.kind}")
        if self.sizes and self.kind in ("feature", "vector"):
            raise ValueError(f"sizes={self.sizes}: {self.kind} values have one size")
        if odd := [size for size in self.sizes if size % self.patch or size > self.size]:
            raise ValueError(
                f"sizes={self.sizes}: {odd[0]} is no multiple of patch={self.patch} up to "
                f"size={self.size}"
            )

    def check_codes(self, name: str, count: int, most: int) -> None:
        """Refuse a tokenizer whose codes a text of the modality `name` cannot hold.

        Raises:
            ValueError: it gives other than `count` codes, or more than `most` different ones.
        """
        import math

        tokens = self.registers or (self.size // self.patch) ** 2
        if tokens != count:
            raise ValueError(f"the text of {name} holds {count} codes, its recipe makes {tokens}")
        if math.prod(self.levels) > most:
            raise ValueError(
                f"the coordinate bins tell {most} codes of {name} apart, its levels {self.levels} "
                f"make {math.prod(self.levels)}: choose smaller levels, or more bins"
            )

    @property
    def crops(self) -> CropPolicy:
        """Crops drawn for training."""
        return CropPolicy(num_crops=4, min_scale=self.min_scale, size=self.size)

    def resolved(self, packed: np.ndarray) -> VQConfig:
        """The network for these values; packed [N, H, W(, C)]."""
        import math

        from tokenizers_vq.vqvae import VQConfig

        feature = self.kind in ("feature", "vector")
        channels = {"rgb": 3, "depth": 1, "normal": 3, "semseg": 8, "edge": 1, "mask": 1}
        sides = {"feature": packed.shape[1], "vector": 1}
        num_classes = 0
        if self.kind == "semseg":
            num_classes = self.num_classes or int(packed[packed != 255].max(initial=0)) + 1
        return VQConfig(
            channels=packed.shape[-1] if feature else channels[self.kind],
            image_size=sides.get(self.kind, self.size),
            patch=1 if feature else self.patch,
            num_classes=num_classes,
            width=self.width,
            encoder_depth=self.encoder_depth,
            decoder_depth=self.decoder_depth,
            quantizer=self.quantizer,
            levels=self.levels,
            codebook_size=math.prod(self.levels),
            jitter=self.jitter,
            registers=self.registers,
            groups=self.groups,
        )

    def codec(self, packed: np.ndarray) -> ValueCodec:
        """The value contract for these values."""
        from tokenizers_vq.codec import ValueCodec, feature_statistics

        if self.kind not in ("feature", "vector"):
            return ValueCodec(kind=self.kind, depth_mode=self.depth_mode)
        mean, std = feature_statistics(packed)
        return ValueCodec(kind=self.kind, mean=mean, std=std)

    def training(self, threads: int = 0) -> TrainConfig:
        """What the trainer is told."""
        from tasks.train_config import TrainConfig

        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            min_lr_ratio=0.02,
            warmup_steps=min(30, self.steps // 10),
            weight_decay=0.01,
            seed=self.seed,
            checkpoint_seconds=30,
            threads=threads,
        )


@dataclass(frozen=True, kw_only=True)
class TextRecipe:
    """Everything that decides what the text tokenizer becomes."""

    bins: int = 1000
    """Coordinate bins per axis; 64 tell 2 px apart at 128."""
    vocab_size: int = 30_000
    """Upper bound of the vocabulary."""
    class_names: tuple[str, ...] = ()
    """Class names that become tokens even if no box shows them."""
    words: tuple[str, ...] = ()
    """Words of the formats of other sequences, which become one token each."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "words", tuple(self.words))


def identity(recipe: TokenizerRecipe | TextRecipe) -> dict[str, Any]:
    """The fields that name what a recipe trains.

    A field that came later counts only where it is set, so that older tokenizers keep their names.
    """
    unset = {
        field.name for field in fields(recipe)
        if field.name in _ADDED and getattr(recipe, field.name) == field.default
    }
    return {name: value for name, value in asdict(recipe).items() if name not in unset}


_RECIPES = {
    "rgb": TokenizerRecipe(kind="rgb", levels=(7, 5, 5, 5, 5)),
    "depth": TokenizerRecipe(kind="depth"),
    "normal": TokenizerRecipe(kind="normal"),
    "semseg": TokenizerRecipe(kind="semseg"),
    "clip": TokenizerRecipe(kind="feature"),
}


def tokenizer_recipe(name: str, **changes: Any) -> TokenizerRecipe:
    """The recipe of a modality, with changes.

    Raises:
        ValueError: if the modality has no learned tokenizer.
    """
    if name not in recipe_names():
        choices = ", ".join(recipe_names())
        raise ValueError(f"no tokenizer recipe for {name!r}; choose from {choices}")
    if name in _RECIPES:
        return replace(_RECIPES[name], **changes)
    fields = modalities.get(name).tokenizer or {}
    return TokenizerRecipe(**{**fields, **changes})


def own_size(name: str) -> int | None:
    """Side in pixels of what the tokenizer of a modality sees, where it is not that of the crops:
    masks of instances are stretched to one of their own."""
    return (modalities.get(name).tokenizer or {}).get("size")


def recipe_names() -> list[str]:
    """Modalities with a learned tokenizer; those that bring their own recipe come last."""
    own = [name for name in modalities.names() if modalities.get(name).tokenizer is not None]
    return [*_RECIPES, *(name for name in own if name not in _RECIPES)]
