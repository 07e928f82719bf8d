"""Stable Diffusion for ControlNet decoders: its networks, and its weights from a folder or the hub.

    folder/unet/diffusion_pytorch_model.safetensors      the denoiser
    folder/vae/diffusion_pytorch_model.safetensors       the autoencoder
    folder/text_encoder/{config.json,model.safetensors}  what the empty prompt is encoded by

They get the names that a released VQ-ControlNet holds them under. Nothing is unpickled: a source
that has its weights as `.bin` alone is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from infra.weights import read_safetensors
from tokenizers_vq.released.shapes import Shapes

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel

SOURCE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
"""Hub id of Stable Diffusion 1.5; the released configuration names a repository that is gone."""
UNET, VAE, EMPTY = "decoder.unet.", "vae.", "decoder.empty_str_encoding"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_TEXT, _PROMPTS = "text_encoder", "decoder.text_encoder."
_RENAMED = {
    ".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0.",
}  # fmt: skip
"""Former names in the autoencoder's attention, as files of the hub still have them."""


@dataclass(frozen=True, kw_only=True)
class UNetSizes:
    """Sizes of the UNet; the defaults are those of Stable Diffusion 1."""

    latent: int = 4
    """Channels of the latents."""
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    """Channels of each level, the finest first."""
    blocks: int = 2
    """Residual blocks of a level on the way down; on the way up one more."""
    attends: tuple[bool, ...] = (True, True, True, False)
    """Levels with attention."""
    context: int = 768
    """Width of the text encoder's tokens."""

    def build(self) -> UNet2DConditionModel:
        """The network with fresh weights."""
        from diffusers import UNet2DConditionModel

        kinds = [f"{'CrossAttn' if attends else ''}{{}}Block2D" for attends in self.attends]
        return UNet2DConditionModel(
            in_channels=self.latent, out_channels=self.latent, block_out_channels=self.widths,
            layers_per_block=self.blocks, cross_attention_dim=self.context,
            down_block_types=tuple(kind.format("Down") for kind in kinds),
            up_block_types=tuple(kind.format("Up") for kind in reversed(kinds)),
        )


@dataclass(frozen=True, kw_only=True)
class AutoencoderSizes:
    """Sizes of the autoencoder; the defaults are those of Stable Diffusion 1."""

    latent: int = 4
    """Channels of the latents."""
    widths: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of each level, the finest first."""
    blocks: int = 2
    """Residual blocks of a level of the encoder; the decoder has one more."""

    def build(self) -> AutoencoderKL:
        """The network with fresh weights."""
        from diffusers import AutoencoderKL

        levels = len(self.widths)
        return AutoencoderKL(
            latent_channels=self.latent, block_out_channels=self.widths,
            layers_per_block=self.blocks, down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
        )


def completed(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Tensors of a VQ-ControlNet with Stable Diffusion's where they lack.

    A text encoder among them is left out: the only prompt that is ever given is the empty one.

    Args:
        tensors: By released names.
        source: Folder or hub id of Stable Diffusion.

    Raises:
        FileNotFoundError: something lacks and the source does not have it.
    """
    own = {_renamed(name): value for name, value in tensors.items()
           if not name.startswith(_PROMPTS)}
    for prefix in (UNET, VAE, EMPTY):
        if not any(name.startswith(prefix) for name in own):
            own |= _part(source, prefix)
    return own


def read_stable(source: str) -> dict[str, Tensor]:
    """All of Stable Diffusion that a ControlNet decoder needs, by released names.

    Raises:
        FileNotFoundError: the source is not there or incomplete; says what it lacks.
    """
    return completed({}, source)


def unet_sizes(shapes: Shapes) -> UNetSizes:
    """Sizes of a UNet's tensors.

    Raises:
        ValueError: a tensor is missing.
    """
    levels = range(shapes.count("down_blocks"))
    inner = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    return UNetSizes(
        latent=shapes["conv_in.weight"][1],
        widths=tuple(shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in levels),
        blocks=shapes.count("down_blocks.0.resnets"),
        attends=tuple(shapes.has(f"down_blocks.{i}.attentions.") for i in levels),
        context=shapes[inner][1],
    )


def autoencoder_sizes(shapes: Shapes) -> AutoencoderSizes:
    """Sizes of an autoencoder's tensors.

    Raises:
        ValueError: a tensor is missing.
    """
    encoder = shapes.below("encoder")
    levels = range(encoder.count("down_blocks"))
    return AutoencoderSizes(
        latent=shapes["post_quant_conv.weight"][0],
        widths=tuple(encoder[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in levels),
        blocks=encoder.count("down_blocks.0.resnets"),
    )


def _part(source: str, prefix: str) -> dict[str, Tensor]:
    if prefix == EMPTY:
        return {EMPTY: _empty_prompt(source)}
    folder = "unet" if prefix == UNET else "vae"
    _, tensors = read_safetensors(_file(source, f"{folder}/{_WEIGHTS}"))
    return {_renamed(prefix + name): value for name, value in tensors.items()}


def _renamed(name: str) -> str:
    if name.startswith(VAE) and ".attentions." in name:
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
    return name


@torch.no_grad()
def _empty_prompt(source: str) -> Tensor:
    """What the text encoder makes of no text, [1, 77, 768]."""
    from transformers import CLIPTextConfig, CLIPTextModel

    for name in ("config.json", "model.safetensors"):
        folder = Path(_file(source, f"{_TEXT}/{name}")).parent
    config: Any = CLIPTextConfig.from_pretrained(folder)
    model = CLIPTextModel.from_pretrained(
        folder, config=config, use_safetensors=True, dtype=torch.float32
    )
    # Begin and end are the last two words of CLIP's vocabulary; the end also fills the rest.
    ids = torch.full((1, config.max_position_embeddings), config.vocab_size - 1)
    ids[0, 0] = config.vocab_size - 2
    return model.eval()(input_ids=ids).last_hidden_state


def _file(source: str, name: str) -> Path:
    """A file of a folder, or of a repository of the hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = f"Stable Diffusion, which this tokenizer decodes with, is looked for at {source!r}"
    if Path(source).is_dir():
        if not (Path(source) / name).is_file():
            raise FileNotFoundError(f"{wanted}: the folder has no {name}")
        return Path(source) / name
    try:
        return Path(hf_hub_download(source, name))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"{wanted}: that is no folder, and the hub gives no {name}: {error}"
        ) from error
