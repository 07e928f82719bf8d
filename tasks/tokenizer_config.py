"""What a recipe of a tokenizer is: network, value contract and training in one frozen object.

`tasks.tokenizer_recipes` holds the recipes themselves.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from models.crops import CropPolicy

if TYPE_CHECKING:
    import numpy as np

    from tasks.train_config import TrainConfig
    from tokenizers_vq.codec import ValueCodec
    from tokenizers_vq.released.design import ReleasedDesign
    from tokenizers_vq.vqvae import VQConfig

Kind = Literal["rgb", "depth", "normal", "semseg", "feature", "vector", "edge", "mask"]
Architecture = Literal["light", "vit", "unet", "uvit", "mlp", "controlnet"]
_ADDED = frozenset({
    "loss", "perceptual", "perceptual_model", "sizes", "registers", "encoder", "start",
    "architecture", "heads", "codes", "latent", "groups", "decoder_width", "out_blocks",
    "prediction", "schedule", "dead_code", "guidance_dropout", "muon", "betas", "warmup", "ema",
    "eval_every", "spread", "words", "picture", "stable_diffusion", "weight_decay", "min_lr_ratio",
})  # fmt: skip
_POSITIVE = ("size", "patch", "width", "steps", "batch_size", "lr", "max_samples", "heads")
_CHANNELS = {"rgb": 3, "depth": 1, "normal": 3, "semseg": 8, "edge": 1, "mask": 1}
_PICTURES: tuple[Kind, ...] = ("rgb", "depth", "normal", "edge", "mask")
_TAKES: dict[str, tuple[Kind, ...]] = {
    "vit": (*_PICTURES, "semseg", "feature"), "unet": _PICTURES, "uvit": _PICTURES,
    "mlp": ("vector",), "controlnet": ("rgb",),
}  # fmt: skip
_PICTURE = 224  # px of the crops that masks are cut from
_CLASS_WIDTH = 64  # of the released network of class maps


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
    """That network: a timm model, or `lpips:vgg`."""
    sizes: tuple[int, ...] = ()
    """Sides in pixels of which each step draws one; empty trains at `size` alone."""
    registers: int = 0
    """Above 0 a sample becomes so many ordered tokens, of which any first few decode."""
    groups: int = 0
    """Tokens of a vector; 0 is one. For `vector` alone."""
    encoder: str = ""
    """Folder of a stored tokenizer: its codes are kept, and only a new decoder is trained, of
    `decoder_depth` blocks, or, of a released network, of another `architecture`."""
    start: str = ""
    """Folder of a stored tokenizer that training goes on from, its network and contract included:
    with `sizes`, the adaptation to several resolutions."""
    architecture: Architecture = "light"
    """`light`: this project's network; as released, `vit`: VQ-VAE, `unet` and `uvit`: DiVAE with
    such a diffusion decoder, `controlnet`: a ControlNet of Stable Diffusion behind the codes of
    `encoder`, `mlp`: single vectors and memcodes. These take `codes`, `latent` and what follows it
    instead of `levels`."""
    heads: int = 4
    """Attention heads of `light`; the released networks have one for each 64 channels."""
    codes: int = 0
    """Codes of a learned codebook; 0: as many as `levels` multiply to."""
    latent: int = 32
    """Width of a code as released."""
    decoder_width: int = 256
    """Channels of a `unet`'s first level, width of a `uvit`'s transformer."""
    out_blocks: int = 0
    """Convolutions that smooth what a `vit` decodes."""
    prediction: Literal["sample", "epsilon", "v_prediction", "v_prediction-epsilon_loss"] = "sample"
    """What a diffusion decoder learns to tell from noisy values."""
    schedule: str = "linear"
    """Its noise: `linear`, `scaled_linear`, `squaredcos_cap_v2`, `sigmoid`, `shifted_cosine:{s}`.
    """
    dead_code: float = 32.0
    """A code of a released codebook that occurs so many times more seldom than the average is
    replaced by a latent of the batch; 0 keeps all."""
    picture: int = 0
    """Side in pixels of the pictures that a `controlnet` learns from and decodes to."""
    stable_diffusion: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Folder or hub id of the Stable Diffusion that it steers."""
    guidance_dropout: float = 0.0
    """Share of samples whose codes a diffusion decoder is not shown, for guidance."""
    spread: float = 0.0
    """Weight of a loss that keeps all FSQ codes in use."""
    muon: bool = True
    """Muon for the hidden matrices of `light`; released networks take AdamW alone."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moments."""
    weight_decay: float = 0.01
    """Decoupled decay of matrices."""
    min_lr_ratio: float = 0.02
    """Final learning rate as a share of the peak."""
    warmup: int = 0
    """Steps of linear warm-up; 0: a tenth of all, at most 30."""
    ema: float = 0.0
    """Decay of the running mean of the weights that is stored in the end; 0 stores the last ones.
    """
    eval_every: int = 0
    """Steps between measurements on the held-out crops; 0: at the end only."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        object.__setattr__(self, "sizes", tuple(self.sizes))
        object.__setattr__(self, "betas", tuple(self.betas))
        self._check()

    def _check(self) -> None:
        if self.architecture not in get_args(Architecture):
            raise ValueError(f"architecture={self.architecture!r}: choose one of "
                             f"{', '.join(get_args(Architecture))}")
        if not self.light and self.kind not in _TAKES[self.architecture]:
            raise ValueError(f"architecture={self.architecture!r} takes "
                             f"{', '.join(_TAKES[self.architecture])}, not {self.kind} values")
        if self.registers and not self.light:
            raise ValueError(f"registers={self.registers}: ordered tokens need the architecture "
                             "'light'")
        if bool(self.picture) != (self.architecture == "controlnet"):
            raise ValueError(f"picture={self.picture}: the architecture 'controlnet' needs a side "
                             "for its pictures, others have none")
        if self.encoder and self.start:
            raise ValueError("encoder= keeps the codes of a tokenizer, start= trains all of it "
                             "further: choose one")
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.weight_decay < 0 or not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"weight_decay={self.weight_decay} must not be negative, and "
                             f"min_lr_ratio={self.min_lr_ratio} lie in 0..1")
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"levels={self.levels}: at least one, and none below 2")
        if min(self.encoder_depth, self.decoder_depth) < 0:
            raise ValueError("encoder_depth and decoder_depth must not be negative, got "
                             f"{self.encoder_depth} and {self.decoder_depth}")
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
        tokens = self.registers or (self.size // self.patch) ** 2
        if tokens != count:
            raise ValueError(f"the text of {name} holds {count} codes, its recipe makes {tokens}")
        if self.vocab_size > most:
            raise ValueError(
                f"the coordinate bins tell {most} codes of {name} apart, its recipe makes "
                f"{self.vocab_size}: choose smaller levels, or more bins"
            )

    @property
    def light(self) -> bool:
        """Whether the network is this project's own."""
        return self.architecture == "light"

    @property
    def scales(self) -> bool:
        """Whether a larger picture has more tokens."""
        return not self.registers and self.kind not in ("feature", "vector", "mask")

    @property
    def vocab_size(self) -> int:
        """Codes of a learned codebook."""
        return self.codes or math.prod(self.levels)

    @property
    def crops(self) -> CropPolicy:
        """Crops drawn for training; of pictures, where what is tokenized are masks in them."""
        size = _PICTURE if self.kind == "mask" else self.picture or self.size
        return CropPolicy(num_crops=4, min_scale=self.min_scale, size=size)

    def network(self, packed: np.ndarray) -> VQConfig | ReleasedDesign:
        """The network for these values; packed [N, H, W(, C)]."""
        return self.resolved(packed) if self.light else self._design(packed)

    def resolved(self, packed: np.ndarray) -> VQConfig:
        """The light network for these values; packed [N, H, W(, C)]."""
        from tokenizers_vq.vqvae import VQConfig

        return VQConfig(
            **self._sizes(packed),
            width=self.width,
            heads=self.heads,
            encoder_depth=self.encoder_depth,
            decoder_depth=self.decoder_depth,
            quantizer=self.quantizer,
            levels=self.levels,
            codebook_size=self.vocab_size,
            jitter=self.jitter,
            registers=self.registers,
            groups=self.groups,
            spread=self.spread,
        )

    def _design(self, packed: np.ndarray) -> ReleasedDesign:
        from tokenizers_vq.released.design import ReleasedDesign

        assert self.architecture != "light"
        sizes = self._sizes(packed)
        if self.kind == "semseg":
            # The released contract gives unlabelled pixels a class of their own, number 0.
            sizes |= {"channels": _CLASS_WIDTH, "num_classes": sizes["num_classes"] + (
                0 if self.num_classes else 1)}
        tokens = (sizes["image_size"] // sizes["patch"]) ** 2
        average = self.batch_size * tokens / self.vocab_size
        return ReleasedDesign(
            **sizes,
            decoder=self.architecture,
            width=self.width,
            depth=self.encoder_depth,
            decoder_width=self.decoder_width,
            decoder_depth=self.decoder_depth,
            vocab_size=self.vocab_size,
            latent=self.latent,
            codebooks=self.groups or 1,
            out_blocks=self.out_blocks,
            dead_below=average / self.dead_code if self.dead_code else 0.0,
            prediction=self.prediction,
            schedule=self.schedule,
            clamp=self.kind != "depth",  # standardised depth goes beyond [-1, 1]
            picture=self.picture,
        )

    def _sizes(self, packed: np.ndarray) -> dict[str, Any]:
        """Channels, side, patch and classes of the values."""
        feature = self.kind in ("feature", "vector")
        sides = {"feature": packed.shape[1], "vector": 1}
        num_classes = 0
        if self.kind == "semseg":
            num_classes = self.num_classes or int(packed[packed != 255].max(initial=0)) + 1
        return {
            "channels": packed.shape[-1] if feature else _CHANNELS[self.kind],
            "image_size": sides.get(self.kind, self.size),
            "patch": 1 if feature else self.patch,
            "num_classes": num_classes,
        }

    def codec(self, packed: np.ndarray) -> ValueCodec:
        """The value contract for these values."""
        from tokenizers_vq.codec import ValueCodec, feature_statistics

        if self.kind not in ("feature", "vector"):
            shifted = self.kind == "semseg" and not self.light
            return ValueCodec(
                kind=self.kind, depth_mode=self.depth_mode, class_offset=1 if shifted else 0
            )
        if not self.light:
            channels = packed.shape[-1]
            return ValueCodec(kind=self.kind, mean=(0.0,) * channels, std=(1.0,) * channels)
        mean, std = feature_statistics(packed)
        return ValueCodec(kind=self.kind, mean=mean, std=std)

    def training(self, threads: int = 0) -> TrainConfig:
        """What the trainer is told."""
        from tasks.train_config import TrainConfig

        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            min_lr_ratio=self.min_lr_ratio,
            warmup_steps=self.warmup or min(30, self.steps // 10),
            weight_decay=self.weight_decay,
            betas=self.betas,
            ema_decay=self.ema,
            finish_with_ema=self.ema > 0,
            eval_every=self.eval_every,
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
