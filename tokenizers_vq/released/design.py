"""The architectures of the released tokenizers by their sizes, to be trained anew.

A network of a checkpoint takes its sizes from tensors (`checkpoint.build`); one without weights
takes them from here. What it trains is stored under the published parameter names, with a
published configuration, so it is read like a released file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from tokenizers_vq.diffusion import Diffusion, Prediction
from tokenizers_vq.released.codebooks import Memcodes, MovingCodebook
from tokenizers_vq.released.controlnet import STABLE, begun
from tokenizers_vq.released.network import ReleasedShape, ReleasedVQ
from tokenizers_vq.released.stable import SOURCE
from tokenizers_vq.released.unet import PatchedUNet
from tokenizers_vq.released.uvit import UViT
from tokenizers_vq.released.vit import BottleneckMLP, ViTDecoder, ViTEncoder
from tokenizers_vq.vqvae import sincos_positions

DecoderKind = Literal["vit", "unet", "uvit", "mlp", "controlnet"]
HEAD_WIDTH = 64
_UNET_LEVELS = (1, 2, 2, 2)


@dataclass(frozen=True, kw_only=True)
class ReleasedDesign:
    """Sizes of a VQ-VAE (`vit`, or `mlp` for single vectors), a DiVAE (`unet`, `uvit`) or a
    VQ-ControlNet."""

    decoder: DecoderKind
    channels: int
    """Channels of the values, or embedding width per class if `num_classes`."""
    image_size: int = 224
    """Side in px, or in cells of a feature map, that the position tables are made for."""
    patch: int = 16
    """Pixels per token and side; 1 for feature maps and vectors."""
    num_classes: int = 0
    """Above 0 the values are class ids in and logits out."""
    width: int = 768
    """Width of the encoder, and of a `vit` or `mlp` decoder."""
    depth: int = 12
    """Blocks of the encoder, and of a `uvit`'s transformer."""
    decoder_width: int = 256
    """Channels of a `unet`'s first level; width of a `uvit`'s transformer, whose convolutions
    have a sixth and a third of it."""
    decoder_depth: int = 3
    """Blocks of a `vit` or `mlp` decoder, residual blocks a level of a `unet` or `uvit`."""
    vocab_size: int = 8192
    """Codes of a codebook."""
    latent: int = 32
    """Width of what is quantised: of a code, or of all codes of an `mlp` together."""
    codebooks: int = 1
    """Tokens of a vector; only `mlp` has more than one."""
    out_blocks: int = 0
    """Convolutions that smooth the output of a `vit` decoder."""
    dead_below: float = 0.0
    """Moving count per batch below which a code is replaced; 0 keeps all."""
    prediction: Prediction = "sample"
    """What a diffusion decoder gives out."""
    schedule: str = "linear"
    """Its noise schedule."""
    clamp: bool = True
    """Whether it clips values to [-1, 1] while sampling."""
    picture: int = 0
    """Side in px of what a `controlnet` decodes."""
    stable_diffusion: str = ""
    """Folder or hub id of a `controlnet`'s Stable Diffusion; empty: fresh weights of its sizes."""

    def __post_init__(self) -> None:
        if self.decoder not in get_args(DecoderKind):
            choices = ", ".join(get_args(DecoderKind))
            raise ValueError(f"decoder={self.decoder!r}: choose one of {choices}")
        if self.image_size % self.patch:
            raise ValueError(f"image_size={self.image_size} is not a multiple of {self.patch}")
        if self.latent % self.codebooks or (self.codebooks > 1) > (self.decoder == "mlp"):
            raise ValueError(f"codebooks={self.codebooks}: only 'mlp' takes several, which divide "
                             f"latent={self.latent}")
        if self.diffusion and (self.num_classes or self.patch % 4):
            raise ValueError(f"a {self.decoder} decoder takes no classes, and patches of 4 n px")

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return self.image_size // self.patch

    @property
    def diffusion(self) -> Diffusion | None:
        """What the decoder is trained for; None of those that answer at once."""
        if self.decoder == "controlnet":
            return STABLE
        if self.decoder not in ("unet", "uvit"):
            return None
        return Diffusion(schedule=self.schedule, prediction=self.prediction, clamp=self.clamp)

    def published(self) -> dict[str, Any]:
        """The configuration in the words of released files."""
        kinds = {"vit": "vit_b_dec", "unet": "unet_patched", "uvit": "uvit_b_p4_f16",
                 "controlnet": "controlnet"}  # fmt: skip
        mlp = self.decoder == "mlp"
        block = "BottleneckMLP/B_6-Wi_1024"
        config: dict[str, Any] = {
            "image_size": self.image_size, "n_channels": self.channels,
            "n_labels": self.num_classes or None, "patch_size": self.patch,
            "patch_proj": self.patch > 1, "post_mlp": not mlp, "out_conv": bool(self.out_blocks),
            "enc_type": block if mlp else "vit_b_enc", "dec_type": kinds.get(self.decoder, block),
            "quant_type": "memcodes" if mlp else "lucid", "codebook_size": self.vocab_size,
            "num_codebooks": self.codebooks, "latent_dim": self.latent, "norm_codes": True,
            "norm_latents": False, "ema_decay": 0.99, "commitment_weight": 1.0,
            "threshold_ema_dead_code": self.dead_below,
        }  # fmt: skip
        if self.decoder == "controlnet":
            config |= {"image_size_sd": self.picture, "sd_path": self.stable_diffusion or SOURCE}
        elif self.diffusion:
            config |= {
                "num_train_timesteps": self.diffusion.steps, "beta_schedule": self.schedule,
                "prediction_type": self.prediction, "zero_terminal_snr": True,
                "thresholding": self.clamp, "clip_sample": self.clamp, "conditioning": "concat",
            }  # fmt: skip
        return config

    def build(self) -> ReleasedVQ:
        """The network with fresh weights, around Stable Diffusion where that is named.

        Raises:
            FileNotFoundError: if Stable Diffusion is not there.
        """
        shape = ReleasedShape(
            vocab_size=self.vocab_size, channels=self.channels, patch=self.patch, grid=self.grid,
            codebooks=self.codebooks, num_classes=self.num_classes, published=self.published(),
            head_width=HEAD_WIDTH,
        )  # fmt: skip
        plain = self.diffusion is None
        if self.decoder == "mlp":
            mlp = {"width": self.width, "hidden": 4 * self.width}
            return ReleasedVQ(
                shape, latent=self.latent, features=(self.width, self.width),
                encoder=BottleneckMLP(channels_in=self.channels, channels_out=self.width,
                                      depth=self.depth, **mlp),
                quantize=Memcodes(self.codebooks, self.vocab_size, self.latent // self.codebooks),
                decoder=BottleneckMLP(channels_in=self.width, channels_out=self.channels,
                                      depth=self.decoder_depth, **mlp),
            )
        encoder = ViTEncoder(
            channels=self.channels, patch=self.patch, depth=self.depth, **self._transformer()
        )
        _set_positions(encoder.pos_emb)
        codebook = MovingCodebook(self.vocab_size, self.latent, dead_below=self.dead_below)
        if self.decoder == "controlnet":
            return begun(
                shape, stable_diffusion=self.stable_diffusion, encoder=encoder, quantize=codebook,
                latent=self.latent, width=self.width, picture=self.picture,
            )
        return ReleasedVQ(
            shape, encoder=encoder, quantize=codebook, latent=self.latent,
            features=(self.width, self.width if plain else 0), decoder=self._decoder(),
            diffusion=self.diffusion,
        )

    def _transformer(self) -> dict[str, Any]:
        return {
            "width": self.width, "heads": max(1, self.width // HEAD_WIDTH),
            "hidden": 4 * self.width, "post_hidden": 4 * self.width,
            "grid": (self.grid, self.grid),
        }  # fmt: skip

    def _decoder(self) -> ViTDecoder | PatchedUNet | UViT:
        inner = self.decoder_width
        if self.decoder == "vit":
            vit = ViTDecoder(
                channels=self.num_classes or self.channels, patch=self.patch,
                depth=self.decoder_depth, out_blocks=self.out_blocks, **self._transformer(),
            )
            _set_positions(vit.pos_emb)
            return vit
        if self.decoder == "unet":
            return PatchedUNet(
                channels=self.channels, condition=self.latent, patch=4, width=inner,
                multipliers=_UNET_LEVELS, blocks=self.decoder_depth, attention_levels=(2, 3),
            )
        uvit = UViT(
            channels=self.channels, condition=self.latent, patch=4,
            widths=(inner // 6, inner // 3), blocks=self.decoder_depth, down_before_middle=True,
            middle_width=inner, middle_depth=self.depth, middle_heads=max(1, inner // HEAD_WIDTH),
            middle_hidden=4 * inner, grid=(self.image_size // 16, self.image_size // 16),
        )
        _set_positions(uvit.mid_block.mid_pos_emb)
        return uvit


@torch.no_grad()
def _set_positions(table: torch.Tensor) -> None:
    """Fills a position table [1, D, h, w] with sines and cosines."""
    width, height, breadth = table.shape[1:]
    rows = sincos_positions(width, height, breadth, height)
    table.copy_(rows.T.reshape(1, width, height, breadth))
