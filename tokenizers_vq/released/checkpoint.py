"""Reading released tokenizer checkpoints; every size comes from the tensors themselves.

    folder/{config.json, model.safetensors}      as published
    file.safetensors                             with the configuration in its header
    checkpoint-*.pth                             of a training: {"model": ..., "args": ...}

What no shape tells is taken from the configuration: norms of the codebook, the diffusion
schedule. Tensors that are missing, surplus or of another shape are refused by name.
"""

from __future__ import annotations

import argparse
import ast
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.strict import read_json
from infra.weights import read_pickled, read_safetensors, require_finite
from tokenizers_vq.diffusion import Diffusion
from tokenizers_vq.released import stable
from tokenizers_vq.released.codebooks import Memcodes, MovingCodebook
from tokenizers_vq.released.controlnet import PICTURE, SteeredDenoiser, VQControlNet
from tokenizers_vq.released.network import ReleasedShape, ReleasedVQ
from tokenizers_vq.released.shapes import Shapes, require_equal
from tokenizers_vq.released.unet import PatchedUNet
from tokenizers_vq.released.uvit import UViT
from tokenizers_vq.released.vit import BottleneckMLP, ViTDecoder, ViTEncoder

Config = dict[str, Any]
Tensors = dict[str, Tensor]

_ALIASES = {"decoder.downsample_mid.Conv2d_0.": "decoder.downsample_mid.conv."}
"""Second names under which released files hold a tensor."""
_CONTROL = "decoder.controlnet."


def read_checkpoint(path: str | Path, *, ema: bool = False) -> tuple[Config, Tensors]:
    """Configuration and tensors of a checkpoint folder or file.

    Args:
        path: One of the forms above.
        ema: Takes the averaged weights of a training checkpoint.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is none of the forms above.
    """
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    beside = file.parent / "config.json"
    config = _described(beside) if beside.exists() else {}
    if file.suffix == ".safetensors":
        header, tensors = _read_safetensors(file)
        config = config or header
    elif file.suffix in (".pth", ".pt"):
        stored, tensors = _read_training(file, "model_ema" if ema else "model")
        config = config or stored
    else:
        raise ValueError(f"{file}: a checkpoint is a folder, or a .safetensors, .pth or .pt file")
    for alias, name in _ALIASES.items():
        for key in [key for key in tensors if key.startswith(alias)]:
            tensors.setdefault(name + key.removeprefix(alias), tensors[key])
            del tensors[key]
    return config, tensors


def _described(file: Path) -> Config:
    try:
        config = read_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}; copy or download it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} describes no tokenizer: it holds no object")
    return config


def _read_safetensors(file: Path) -> tuple[Config, Tensors]:
    header, tensors = read_safetensors(file)
    return {key: _literal(text) for key, text in header.items()}, tensors


def _literal(text: str) -> Any:
    """A value of the header, which holds configurations as Python writes them."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _read_training(file: Path, key: str) -> tuple[Config, Tensors]:
    stored = read_pickled(file)
    if not isinstance(stored, dict) or key not in stored:
        held = ", ".join(sorted(map(str, stored))) if isinstance(stored, dict) else "something else"
        raise ValueError(f"{file} holds {held:.200}, not {key!r}")
    args, tensors = stored.get("args"), stored[key]
    if not isinstance(tensors, Mapping) or not all(
        isinstance(name, str) and isinstance(each, Tensor) for name, each in tensors.items()
    ):
        raise ValueError(f"{file}: its {key!r} are no tensors by name")
    if not isinstance(args, argparse.Namespace | None):
        raise ValueError(f"{file}: its args are no settings of a training")
    return dict(vars(args)) if args is not None else {}, dict(tensors)


def build(config: Config, tensors: Tensors, *, head_width: int = 64) -> ReleasedVQ:
    """The network of a checkpoint, with its weights, in evaluation mode.

    Args:
        config: The published configuration; unknown keys do not matter.
        tensors: All tensors by their published names; Stable Diffusion's may be left out where the
            configuration names it.
        head_width: Channels per attention head, which no file tells.

    Raises:
        FileNotFoundError: if Stable Diffusion is needed and not there.
        ValueError: if tensors are missing, surplus, of another shape or no numbers, or settings
            make no network.
    """
    require_finite(tensors, "the checkpoint")
    try:
        return _built(config, tensors, head_width)
    except (ValueError, FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        raise ValueError("the settings and shapes of the checkpoint make no network: "
                         f"{type(error).__name__}: {error}") from error  # fmt: skip


def _built(config: Config, tensors: Tensors, head_width: int) -> ReleasedVQ:
    if config.get("conditioning", "concat") != "concat":
        raise ValueError(f"conditioning={config['conditioning']!r}: only 'concat' is supported")
    if any(name.startswith(_CONTROL) for name in tensors):
        tensors = stable.completed(tensors, config.get("sd_path") or stable.SOURCE)
    shapes = Shapes(tensors)
    with torch.device("meta"):
        net = _network(config, shapes, head_width)
    require_equal(net.state_dict(), tensors)
    net.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    return net.eval()


def _network(config: Config, shapes: Shapes, head_width: int) -> ReleasedVQ:
    enc, dec = shapes.below("encoder"), shapes.below("decoder")
    single = enc.has("linear_in.")
    num_classes, channels = 0, enc["linear_in.weight" if single else "proj.weight"][1]
    if shapes.has("cls_emb."):
        num_classes, channels = shapes["cls_emb.weight"]
    patch = 1 if single else enc["proj.weight"][2]
    grid = 1 if single else enc["pos_emb"][2]
    latent, width = shapes["quant_proj.weight"][:2]
    quantize = _bottleneck(config, shapes.below("quantize"))
    heads = quantize.heads if isinstance(quantize, Memcodes) else 1
    shape = ReleasedShape(
        vocab_size=quantize.vocab_size, channels=channels, patch=patch, grid=grid,
        codebooks=heads, num_classes=num_classes, published=dict(config), head_width=head_width,
    )
    encoder = _mlp(enc) if single else ViTEncoder(
        channels=channels, patch=patch, **_transformer(enc, head_width)
    )
    if shapes.has(_CONTROL):
        assert isinstance(encoder, ViTEncoder)
        assert isinstance(quantize, MovingCodebook)
        return _controlled(config, shapes, shape, encoder, quantize)
    diffusion: Diffusion | None = None
    decoder: ViTDecoder | BottleneckMLP | PatchedUNet | UViT | None = None
    if dec.has("time_embed"):
        diffusion = _diffusion(config)
        if dec.has("input_blocks."):
            decoder = _unet(dec, channels, latent)
        else:
            decoder = _uvit(dec, channels, latent, head_width)
    elif dec.has(""):
        decoder = _plain_decoder(config, dec, num_classes or channels, patch, head_width)
    plain = decoder is not None and diffusion is None
    return ReleasedVQ(
        shape, encoder=encoder, quantize=quantize, latent=latent, decoder=decoder,
        diffusion=diffusion, features=(width, shapes["post_quant_proj.weight"][0] if plain else 0),
    )


def _controlled(
    config: Config, shapes: Shapes, shape: ReleasedShape, encoder: ViTEncoder,
    quantize: MovingCodebook,
) -> VQControlNet:
    latent, width = shapes["quant_proj.weight"][:2]
    reads = shapes.below("decoder.controlnet.controlnet_cond_embedding")
    if reads.has("adapter_model."):
        raise ValueError("the ControlNet reads codes through an adapter: that is not supported")
    convolutions = range(1, reads.count("blocks"), 2)
    widths = (reads["conv_in.weight"][0], *(reads[f"blocks.{i}.weight"][0] for i in convolutions))
    unet = stable.unet_sizes(shapes.below("decoder.unet")).build()
    vae = stable.autoencoder_sizes(shapes.below("vae")).build()
    picture = config.get("image_size_sd") or config.get("input_size_sd") or PICTURE
    return VQControlNet(
        shape, encoder=encoder, quantize=quantize, latent=latent, width=width,
        decoder=SteeredDenoiser(unet, latent, widths), vae=vae, picture=int(picture),
    )


def _bottleneck(config: Config, shapes: Shapes) -> MovingCodebook | Memcodes:
    if shapes.has("codes"):
        return Memcodes(*shapes["codes"])
    return MovingCodebook(
        *shapes["_codebook.embed"],
        cosine=bool(config.get("norm_codes", True)),
        norm_latents=bool(config.get("norm_latents", False)),
        decay=float(config.get("ema_decay", 0.99)),
        dead_below=float(config.get("threshold_ema_dead_code", 0.0)),
        commitment=float(config.get("commitment_weight", 1.0)),
    )


def _diffusion(config: Config) -> Diffusion:
    clamp = config.get("thresholding", True) or config.get("clip_sample", False)
    return Diffusion(
        schedule=config.get("beta_schedule", "linear"),
        steps=int(config.get("num_train_timesteps", 1000)),
        zero_terminal_snr=bool(config.get("zero_terminal_snr", True)),
        prediction=config.get("prediction_type", "sample"),
        clamp=bool(clamp),
    )


def _transformer(shapes: Shapes, head_width: int) -> Config:
    width, *grid = shapes["pos_emb"][1:]
    return {
        "width": width,
        "grid": tuple(grid),
        "depth": shapes.count("blocks"),
        "heads": max(1, width // head_width),
        "hidden": shapes["blocks.0.mlp.fc1.weight"][0],
        "post_hidden": shapes["post_mlp.fc1.weight"][0] if shapes.has("post_mlp.") else 0,
    }


def _mlp(shapes: Shapes) -> BottleneckMLP:
    width, channels = shapes["linear_in.weight"]
    return BottleneckMLP(
        channels_in=channels, channels_out=shapes["linear_out.weight"][0], width=width,
        depth=shapes.count("blocks"), hidden=shapes["blocks.0.block.0.weight"][0],
    )


def _plain_decoder(
    config: Config, shapes: Shapes, channels: int, patch: int, head_width: int
) -> ViTDecoder | BottleneckMLP:
    if shapes.has("linear_in."):
        return _mlp(shapes)
    return ViTDecoder(
        channels=channels, patch=config.get("patch_size_dec") or patch,
        out_blocks=shapes.count("out_conv"), **_transformer(shapes, head_width),
    )


def _unet(shapes: Shapes, channels: int, condition: int) -> PatchedUNet:
    width = shapes["input_blocks.0.0.weight"][0]
    blocks, multipliers, attention = 0, [0], []
    for i in range(1, shapes.count("input_blocks")):
        layers = shapes.below(f"input_blocks.{i}")
        if layers.has("0.op."):
            multipliers.append(0)
            continue
        level = len(multipliers) - 1
        blocks += level == 0
        multipliers[level] = layers["0.in_layers.2.weight"][0] // width
        if layers.has("1.qkv."):
            attention.append(level)
    return PatchedUNet(
        channels=channels, condition=condition, width=width, multipliers=multipliers,
        patch=math.isqrt(shapes["out.2.weight"][0] // channels), blocks=blocks,
        attention_levels=attention,
    )


def _uvit(shapes: Shapes, channels: int, condition: int, head_width: int) -> UViT:
    levels = shapes.count("down_blocks")
    middle = shapes.below("mid_block")
    width, *grid = middle["mid_pos_emb"][1:]
    return UViT(
        channels=channels, condition=condition, patch=shapes["conv_in.weight"][2],
        widths=[shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)],
        blocks=shapes.count("down_blocks.0.resnets"),
        down_before_middle=shapes.has("downsample_mid."),
        middle_width=width, middle_depth=middle.count("mid_block"),
        middle_heads=max(1, width // head_width),
        middle_hidden=middle["mid_block.0.mlp.fc1.weight"][0], grid=(grid[0], grid[1]),
    )
