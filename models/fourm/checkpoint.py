"""Released 4M checkpoints: `config.json` and `model.safetensors` by their published names.

The published configuration holds neither vocabularies nor lengths; vocabularies and grids follow
from tensor shapes, lengths from `modalities.json`, which this project writes beside the two, or
from the table below. The input embedding of grids inside the decoder, which no model uses, is
dropped on reading and written as a copy of the output matrix.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from models.fourm.embeddings import DenseInput, position_table
from models.fourm.model import FourM
from models.fourm.spec import POSITION_ROWS, FourMConfig, ModalitySpec

if TYPE_CHECKING:
    from infra.store import Store

FILES = ("config.json", "model.safetensors", "modalities.json")
# (longest sequence, target position that wraps to 0) of released sequences
RELEASED_LENGTHS = {
    "caption": (256, 256), "det": (256, 256), "t5_caption": (77, 77), "metadata": (40, 40),
    "human_poses": (275, 263), "color_palette": (23, 23), "sam_instance": (290, 290),
}
_BIASES = ("norm_bias", "qkv_bias", "proj_bias", "mlp_bias")


def load(folder: str | Path) -> FourM:
    """Reads a checkpoint folder. Raises FileNotFoundError, or ValueError for what does not fit."""
    folder = Path(folder)
    return build({name: (folder / name).read_bytes() for name in FILES
                  if name != "modalities.json" or (folder / name).exists()})


def load_stored(store: Store, path: str) -> FourM:
    """Reads a checkpoint folder of a store."""
    return build({name: store.read(f"{path}/{name}") for name in FILES
                  if name != "modalities.json" or store.exists(f"{path}/{name}")})


def save_released(model: FourM, folder: str | Path) -> None:
    """Writes `model` to a folder that released code and `load` read."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files(model).items():
        (folder / name).write_bytes(data)


def files(model: FourM) -> dict[str, bytes]:
    """The files of a checkpoint by name."""
    from safetensors.torch import save

    config = _released_config(model.config)
    tensors = {name: value.detach().cpu().float().contiguous().clone()
               for name, value in to_released(model).items()}
    specs = [dataclasses.asdict(spec) for spec in model.config.modalities]
    header = {"format": "pt", **{key: str(value) for key, value in config.items()}}
    return {
        "model.safetensors": save(tensors, metadata=header),
        "modalities.json": json.dumps(specs, indent=1).encode(),
        "config.json": json.dumps(config, indent=1).encode(),
    }


def build(
    contents: Mapping[str, bytes], lengths: Mapping[str, tuple[int, int]] | None = None
) -> FourM:
    """Builds the model from the files of a checkpoint.

    `lengths` (longest sequence, position limit) by modality overrides the known lengths.
    """
    from safetensors.torch import load as load_tensors

    config = json.loads(contents["config.json"])
    tensors = load_tensors(contents["model.safetensors"])
    _restore_shared(config, tensors)
    if "modalities.json" in contents:
        specs = [ModalitySpec(**spec) for spec in json.loads(contents["modalities.json"])]
    else:
        known = {**RELEASED_LENGTHS, **(lengths or {})}
        names = sorted({*config["domains_in"], *config["domains_out"]})
        specs = [_spec(name, config, tensors, known) for name in names]
    model = FourM(_own_config(config, specs, tensors))
    _fill(model, tensors)
    return model.eval()


def to_released(model: FourM, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Tensors by their published names; `values` maps parameter names to other tensors of the same
    shapes (gradients, say), which are then renamed instead."""
    config, out = model.config, {}
    for name, own in _core(model):
        out[name] = own if values is None else values[name]
    if not config.bias:
        # Released norms without a bias keep an all-zero one in the file.
        out.update({n.replace(".weight", ".bias"): torch.zeros_like(out[n])
                    for n in list(out) if "norm" in n and n.endswith(".weight")})
    for spec in config.modalities:
        for name, (source, view) in _embeddings(model, spec).items():
            table = dict(model.named_parameters()).get(source) if source else None
            if values is not None and table is not None:
                out[name] = _same_view(values[source], table, view)
            else:
                out[name] = view
    return out


def _same_view(other: Tensor, table: Tensor, view: Tensor) -> Tensor:
    """The part of `other` that `view` is of `table`."""
    start = view.storage_offset() - table.storage_offset()
    return other.reshape(-1)[start : start + view.numel()].view(view.shape)


def _core(model: FourM) -> Iterator[tuple[str, Tensor]]:
    """Parameters whose names are the published ones."""
    prefixes = ("encoder.", "decoder.", "encoder_norm.", "decoder_norm.", "decoder_proj_context.")
    for name, value in model.named_parameters():
        if name.startswith(prefixes) or name in ("mask_token", "register_tokens"):
            yield name, value


def _embeddings(model: FourM, spec: ModalitySpec) -> dict[str, tuple[str, Tensor]]:
    """Published name -> (own parameter or "", its view) for all embeddings of a modality."""
    config, index = model.config, model.config.index(spec.name)
    found: dict[str, tuple[str, Tensor]] = {}
    if spec.is_input:
        p = f"encoder_embeddings.{spec.name}"
        learned = "enc_positions.learned" if spec.learned_positions else ""
        found[f"{p}.mod_emb"] = "enc_modality", model.enc_modality[index].view(1, 1, -1)
        found[f"{p}.pos_emb"] = learned, model.enc_positions.rows(spec).unsqueeze(0)
        if spec.discrete:
            found[f"{p}.token_emb.weight"] = "enc_tokens.weight", model.enc_tokens.rows(spec)
        else:
            proj = "proj" if spec.kind == "pixels" else "emb_proj"
            dense = cast(DenseInput, model.dense[str(index)])
            for name, value in dense.proj.named_parameters():
                found[f"{p}.{proj}.{name}"] = f"dense.{index}.proj.{name}", value
    if spec.is_target:
        p = f"decoder_embeddings.{spec.name}"
        learned = "dec_positions.learned" if spec.learned_positions else ""
        shared = config.share_modality_embeddings
        found[f"{p}.mod_emb"] = ("enc_modality" if shared else "dec_modality",
                                 model.dec_modality[index].view(1, 1, -1))
        found[f"{p}.pos_emb"] = learned, model.dec_positions.rows(spec).unsqueeze(0)
        found[f"{p}.to_logits.weight"] = "heads.weight", model.heads.rows(spec)
        if spec.kind == "seq" and model.dec_tokens is not None:
            found[f"{p}.token_emb.weight"] = "dec_tokens.weight", model.dec_tokens.rows(spec)
        else:
            found[f"{p}.token_emb.weight"] = "heads.weight", model.heads.rows(spec)
    return found


@torch.no_grad()
def _fill(model: FourM, tensors: dict[str, Tensor]) -> None:
    """Copies published tensors into the model; every one the model needs must be there."""
    wanted = dict(_core(model))
    for spec in model.config.modalities:
        for name, (_, view) in _embeddings(model, spec).items():
            if not (name.endswith("token_emb.weight") and spec.kind == "img"
                    and name.startswith("decoder")):
                wanted[name] = view
    for name, value in wanted.items():
        if name not in tensors:
            raise ValueError(f"the checkpoint lacks the tensor {name}")
        if tensors[name].shape != value.shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, the configuration "
                             f"asks for {tuple(value.shape)}")
        value.copy_(tensors[name])


def _restore_shared(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Puts back modality vectors that were stored once because encoder and decoder share them."""
    if not config["share_modality_embeddings"]:
        return
    for name in config["domains_in"]:
        enc, dec = f"encoder_embeddings.{name}.mod_emb", f"decoder_embeddings.{name}.mod_emb"
        if enc not in tensors and dec in tensors:
            tensors[enc] = tensors[dec]
        elif dec not in tensors and enc in tensors and name in config["domains_out"]:
            tensors[dec] = tensors[enc]


def _spec(
    name: str, config: dict[str, Any], tensors: dict[str, Tensor],
    lengths: Mapping[str, tuple[int, int]],
) -> ModalitySpec:
    is_input, is_target = name in config["domains_in"], name in config["domains_out"]
    prefix = f"{'encoder' if is_input else 'decoder'}_embeddings.{name}"
    if f"{prefix}.pos_emb" not in tensors:
        raise ValueError(f"the checkpoint lacks the embeddings of its modality {name}")
    positions = tensors[f"{prefix}.pos_emb"][0]
    common: dict[str, Any] = {"name": name, "is_input": is_input, "is_target": is_target}
    if f"{prefix}.proj.weight" in tensors:
        patch = math.isqrt(tensors[f"{prefix}.proj.weight"].shape[1] // 3)
        return ModalitySpec(kind="pixels", max_tokens=len(positions), patch_size=patch, **common)
    longest, limit = lengths.get(name, (256, 256))
    if f"{prefix}.emb_proj.weight" in tensors:
        width = tensors[f"{prefix}.emb_proj.weight"].shape[1]
        return ModalitySpec(kind="seq_emb", max_tokens=longest, channels=width, **common)
    common["vocab_size"] = len(tensors[f"{prefix}.token_emb.weight"])
    if len(positions) == POSITION_ROWS:
        return ModalitySpec(kind="seq", max_tokens=longest, max_length=limit, **common)
    spec = ModalitySpec(kind="img", max_tokens=len(positions), **common)
    table = position_table(spec, positions.shape[1])
    learned = table.shape != positions.shape or not torch.allclose(table, positions, atol=1e-4)
    return dataclasses.replace(spec, learned_positions=learned)


def _own_config(
    config: dict[str, Any], specs: list[ModalitySpec], tensors: dict[str, Tensor]
) -> FourMConfig:
    biases = {bool(config[key]) for key in _BIASES}
    if len(biases) > 1:
        raise ValueError("checkpoints with biases in some layers only are not supported")
    tied = all(
        torch.equal(tensors[f"{p}.token_emb.weight"], tensors[f"{p}.to_logits.weight"])
        for spec in specs if spec.is_target and spec.kind == "seq"
        for p in [f"decoder_embeddings.{spec.name}"]
    )
    registers = tensors.get("register_tokens")
    return FourMConfig(
        modalities=tuple(specs), bias=biases.pop(), tie_embeddings=tied,
        num_register_tokens=0 if registers is None else registers.shape[1],
        **{key: config[key] for key in (
            "dim", "encoder_depth", "decoder_depth", "num_heads", "mlp_ratio", "gated_mlp",
            "qk_norm", "share_modality_embeddings")},
    )


def _released_config(config: FourMConfig) -> dict[str, Any]:
    pixels = [m for m in config.modalities if m.kind == "pixels"]
    patch = pixels[0].patch_size if pixels else 16
    grids = [m for m in config.modalities if m.kind in ("img", "pixels")]
    out: dict[str, Any] = {
        "domains_in": [m.name for m in config.inputs],
        "domains_out": [m.name for m in config.targets],
        "image_size": patch * max((m.grid for m in grids), default=14), "patch_size": patch,
        "act_layer": "SiLU" if config.gated_mlp else "GELU",
        **dict.fromkeys(_BIASES, config.bias),
        **{key: getattr(config, key) for key in (
            "dim", "encoder_depth", "decoder_depth", "num_heads", "mlp_ratio", "gated_mlp",
            "qk_norm", "share_modality_embeddings")},
    }
    if config.num_register_tokens:
        out["num_register_tokens"] = config.num_register_tokens
    return out
