"""A model under the names and in the configuration of released 4M checkpoints.

The input embedding of grids inside the decoder, which no model uses, is a copy of the output
matrix; norms without a bias have an all-zero one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from infra.strict import is_of
from models.fourm.embeddings import DenseInput
from models.fourm.model import FourM
from models.fourm.spec import FourMConfig, ModalitySpec

BIASES = ("norm_bias", "qkv_bias", "proj_bias", "mlp_bias")
SIZES = ("dim", "encoder_depth", "decoder_depth", "num_heads", "mlp_ratio", "gated_mlp", "qk_norm",
         "share_modality_embeddings")
"""Settings that our configuration and a released one have in common."""
_REQUIRED = ("domains_in", "domains_out", "patch_size", "act_layer", *BIASES, *SIZES)
# Settings that change nothing about a trained model, and the only values of others we compute.
_IGNORED = frozenset({"image_size", "use_act_checkpoint", "drop_path_rate_encoder",
                      "drop_path_rate_decoder", "shared_drop_path", "num_register_tokens"})
_LEAST = {"dim": 4, "encoder_depth": 0, "decoder_depth": 0, "num_heads": 1, "mlp_ratio": 0,
          "patch_size": 1}
_MOST = 1 << 17
_FIXED = {"decoder_causal_mask": False, "decoder_sep_mask": True}


def to_released(model: FourM, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Tensors by their published names; `values` maps parameter names to other tensors of the same
    shapes (gradients, say), which are then renamed instead."""
    config, out = model.config, {}
    for name, own in core(model):
        out[name] = own if values is None else values[name]
    if not config.bias:
        # Released norms without a bias keep an all-zero one in the file.
        out.update({n.replace(".weight", ".bias"): torch.zeros_like(out[n])
                    for n in list(out) if "norm" in n and n.endswith(".weight")})
    for spec in config.modalities:
        for name, (source, view) in embeddings(model, spec).items():
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


def core(model: FourM) -> Iterator[tuple[str, Tensor]]:
    """Parameters whose names are the published ones."""
    prefixes = ("encoder.", "decoder.", "encoder_norm.", "decoder_norm.", "decoder_proj_context.")
    for name, value in model.named_parameters():
        if name.startswith(prefixes) or name in ("mask_token", "register_tokens"):
            yield name, value


def embeddings(model: FourM, spec: ModalitySpec) -> dict[str, tuple[str, Tensor]]:
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


def needed(model: FourM) -> dict[str, Tensor]:
    """Tensors that a file must hold to fill the model, by their published names."""
    found = dict(core(model))
    for spec in model.config.modalities:
        for name, (_, view) in embeddings(model, spec).items():
            if not (name.endswith("token_emb.weight") and spec.kind == "img"
                    and name.startswith("decoder")):
                found[name] = view
    return found


def released_config(config: FourMConfig) -> dict[str, Any]:
    """`config.json` of a checkpoint."""
    pixels = [m for m in config.modalities if m.kind == "pixels"]
    grids = pixels or [m for m in config.modalities if m.kind == "img"]
    patch = pixels[0].patch_size if pixels else 16
    out: dict[str, Any] = {
        "domains_in": [m.name for m in config.inputs],
        "domains_out": [m.name for m in config.targets],
        "image_size": patch * grids[0].grid if grids else 224, "patch_size": patch,
        "act_layer": "SiLU" if config.gated_mlp else "GELU",
        **dict.fromkeys(BIASES, config.bias),
        **{key: getattr(config, key) for key in SIZES},
    }
    if config.num_register_tokens:
        out["num_register_tokens"] = config.num_register_tokens
    return out


def checked_config(config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration, if it is complete and of a network that `FourM` is, no larger than its
    tensors: even one without storage takes time and memory for each of its blocks."""
    if not isinstance(config, dict):
        raise ValueError("config.json holds no object")
    lacking = [key for key in _REQUIRED if key not in config]
    if lacking:
        raise ValueError(f"config.json lacks {', '.join(lacking)}")
    for key in ("domains_in", "domains_out"):
        names = config[key]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{key} of config.json must be a list of names, not {names!r}")
    for key, least in _LEAST.items():
        number = config[key]
        kinds = (int, float) if key == "mlp_ratio" else (int,)
        if type(number) not in kinds or not least <= number < _MOST:
            raise ValueError(f"{key} of config.json must be a number from {least} on, not "
                             f"{number!r:.80}")  # fmt: skip
    for key in ("encoder_depth", "decoder_depth"):
        if config[key] > len(tensors):
            raise ValueError(f"{key} of config.json is {config[key]}, but model.safetensors holds "
                             f"{len(tensors)} tensors")  # fmt: skip
    if not is_of(config.get("num_register_tokens", 0), int):
        raise ValueError("num_register_tokens of config.json must be a whole number")
    if len({bool(config[key]) for key in BIASES}) > 1:
        listed = ", ".join(f"{key} {config[key]}" for key in BIASES)
        raise ValueError(f"biases in some layers only are not supported: {listed}")
    activation = "SiLU" if config["gated_mlp"] else "GELU"
    if config["act_layer"] != activation:
        raise ValueError(f"act_layer {config['act_layer']} is not supported with gated_mlp "
                         f"{config['gated_mlp']}; only {activation} is")
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key} {config[key]} is not supported; only {value} is")
    unknown = sorted(config.keys() - set(_REQUIRED) - _IGNORED - _FIXED.keys())
    if unknown:
        warnings.warn(f"config.json holds unknown settings, which are ignored: "
                      f"{', '.join(unknown)}", stacklevel=3)
    return config
