"""Released 4M checkpoints: `config.json` and `model.safetensors` by their published names.

    model = load("EPFL-VILAB/4M-21_B@<commit>")       # or a folder
    save_released(model, "my-model")

The published configuration holds neither vocabularies nor lengths; vocabularies, patches and grids
follow from tensor shapes, lengths from `modalities.json`, which this project writes beside the
two, or from the table below. A file that does not fit its configuration is refused before a
network is built.

What released models were trained with and therefore need is kept: sequences longer than their
position table (people's poses) start again at position 0, an absent modality counts in the mean
of the `mod` loss. What the released code does wrong and no checkpoint depends on is not: see
`FourMConfig.loss` for its token loss, `decoding` for guidance over random orders and registers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from infra.strict import read_json, typed
from infra.weights import named, read_safetensors, require_finite
from models.fourm.embeddings import position_table, sincos_1d
from models.fourm.model import FourM
from models.fourm.released import (
    SIZES,
    checked_config,
    needed,
    released_config,
    to_released,
)
from models.fourm.spec import CHUNKS, POSITION_ROWS, FourMConfig, ModalitySpec

if TYPE_CHECKING:
    from infra.store import Store

__all__ = ["FILES", "build", "files", "load", "load_stored", "save_released", "to_released"]

FILES = ("config.json", "model.safetensors", "modalities.json")
Lengths = Mapping[str, tuple[int, int]]
RELEASED_LENGTHS = {
    "caption": (256, 256), "det": (256, 256), "t5_caption": (77, 77), "metadata": (40, 40),
    "human_poses": (275, 263), "color_palette": (23, 23), "sam_instance": (290, 290),
}
"""(longest sequence, target position that wraps to 0) of released sequences."""
_SHOWN = 6  # tensors named in an error


def load(
    path_or_hub_id: str | Path, revision: str | None = None, *, lengths: Lengths | None = None
) -> FourM:
    """Opens a checkpoint and returns its model in evaluation mode.

    Args:
        path_or_hub_id: A folder, or a model of the Hugging Face hub, "org/name" or
            "org/name@revision".
        revision: Commit, branch or tag of a hub model; pin a commit for a repeatable run.
        lengths: (longest sequence, position limit) by modality, where they are neither stored
            nor those of released models.

    Raises:
        FileNotFoundError: no such folder or hub model, or one without these files.
        ValueError: a file is damaged, or the tensors do not fit the configuration: names, shapes
            and what is missing.
    """
    folder = locate(path_or_hub_id, revision)
    lacking = [name for name in FILES[:2] if not (folder / name).exists()]
    if lacking:
        raise FileNotFoundError(f"{path_or_hub_id} lacks {' and '.join(lacking)}")
    contents = {name: (folder / name).read_bytes() for name in FILES
                if name.endswith(".json") and (folder / name).exists()}
    _, tensors = read_safetensors(folder / "model.safetensors")
    with named(path_or_hub_id):
        return _assembled(contents, tensors, lengths)


@contextmanager
def _whole(name: str) -> Iterator[None]:
    """Names the file that cannot be read."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is damaged: {error}") from error


def locate(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint, downloaded from the hub if it is none of this machine's.

    Raises:
        FileNotFoundError: neither a folder nor a model of the hub.
        ValueError: a revision of a folder, or two revisions.
    """
    folder, text = Path(path_or_hub_id), str(path_or_hub_id)
    if folder.is_dir():
        if revision:
            raise ValueError(f"{text} is a folder and has no revision {revision!r}")
        return folder
    name, _, tag = text.partition("@")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f"{text} is neither a folder nor a hub id like org/name@revision")
    if revision and tag and revision != tag:
        raise ValueError(f"{text} names another revision than {revision!r}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision or tag or None,
                                      allow_patterns=list(FILES)))
    except OSError as error:  # the hub's own errors are OSErrors too
        raise FileNotFoundError(f"{text} is no folder here, and as a hub id it cannot be "
                                f"downloaded: {error}") from error


def load_stored(store: Store, path: str) -> FourM:
    """Reads a checkpoint folder of a store."""
    with named(store.full(path)):
        return build({name: store.read(f"{path}/{name}") for name in FILES
                      if name != "modalities.json" or store.exists(f"{path}/{name}")})


def save_released(model: FourM, folder: str | Path) -> None:
    """Writes `model` to a folder that released code and `load` read. Each file appears whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files(model).items():
        part = folder / f".{name}.part"
        part.write_bytes(data)
        os.replace(part, folder / name)


def files(model: FourM) -> dict[str, bytes]:
    """The files of a checkpoint by name."""
    from safetensors.torch import save

    config = released_config(model.config)
    tensors = {name: value.detach().cpu().float().contiguous().clone()
               for name, value in to_released(model).items()}
    specs = [dataclasses.asdict(spec) for spec in model.config.modalities]
    header = {"format": "pt", **{key: str(value) for key, value in config.items()}}
    return {
        "model.safetensors": save(tensors, metadata=header),
        "modalities.json": json.dumps(specs, indent=1).encode(),
        "config.json": json.dumps(config, indent=1).encode(),
    }


def build(contents: Mapping[str, bytes], lengths: Lengths | None = None) -> FourM:
    """Builds the model from the files of a checkpoint; otherwise like `load`."""
    from safetensors.torch import load as load_tensors

    with _whole("model.safetensors"):
        tensors = load_tensors(contents["model.safetensors"])
    return _assembled(contents, tensors, lengths)


def _assembled(
    contents: Mapping[str, bytes], tensors: dict[str, Tensor], lengths: Lengths | None
) -> FourM:
    with _whole("config.json"):
        config = checked_config(read_json(contents["config.json"]), tensors)
    _restore_shared(config, tensors)
    problems = _Problems()
    if "modalities.json" in contents:
        with _whole("modalities.json"):
            stored = read_json(contents["modalities.json"])
        specs = _stored_specs(stored, config)
    else:
        known = {**RELEASED_LENGTHS, **(lengths or {})}
        names = sorted({*config["domains_in"], *config["domains_out"]})
        found = [_spec(name, config, tensors, known, problems) for name in names]
        specs = [spec for spec in found if spec is not None]
    if not any(s.is_input for s in specs) or not any(s.is_target for s in specs):
        problems.report()
    own = _own_config(config, specs, tensors)
    _compare(own, tensors, problems)
    problems.report()
    require_finite(tensors, "model.safetensors")
    model = FourM(own)
    with torch.no_grad():
        for name, value in needed(model).items():
            value.copy_(tensors[name])
    return model.eval()


class _Problems:
    """What does not fit, gathered before it is reported; shapes by the names of tensors."""

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}
        self.surplus: dict[str, str] = {}
        self.misshapen: dict[str, str] = {}
        self.unread: set[str] = set()  # modalities that lack what would tell their shapes

    def report(self) -> None:
        """Raises ValueError with names and shapes if anything does not fit."""
        parts = []
        for kind, found in (("missing", self.missing), ("surplus", self.surplus),
                            ("misshapen", self.misshapen)):
            if found:
                some = [f"{name} {text}" for name, text in sorted(found.items())[:_SHOWN]]
                more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
                parts.append(f"{len(found)} {kind}: {', '.join(some)}{more}")
        if parts:
            raise ValueError(f"the tensors do not fit the configuration; {'; '.join(parts)}")


def _compare(config: FourMConfig, tensors: Mapping[str, Tensor], problems: _Problems) -> None:
    """Notes every tensor that a model of `config` lacks, has no use for, or has in another shape.

    Shapes come from a network without storage, so that nothing is allocated for a wrong file.
    """
    with torch.device("meta"):
        model = FourM(config)
    wanted, allowed = needed(model), to_released(model)
    skipped = tuple(f"{side}_embeddings.{name}." for name in problems.unread
                    for side in ("encoder", "decoder"))
    for name, value in wanted.items():
        if name not in tensors:
            problems.missing[name] = str(list(value.shape))
    for name, value in tensors.items():
        if name.startswith(skipped):
            continue
        if name not in allowed:
            problems.surplus[name] = str(list(value.shape))
        elif value.shape != allowed[name].shape:
            problems.misshapen[name] = f"{list(value.shape)}, not {list(allowed[name].shape)}"
        elif not value.is_floating_point():
            problems.misshapen[name] = f"{list(value.shape)} of {value.dtype}, not of floats"
        elif name not in wanted and name.endswith(".bias") and bool(value.any()):
            problems.surplus[name] = f"{list(value.shape)}, not 0 in a model without biases"


def _restore_shared(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Puts back what writers store once: modality vectors that encoder and decoder share, and a
    decoder's token matrix that is both its input and its output."""
    pairs = []
    if config["share_modality_embeddings"]:
        both = [name for name in config["domains_in"] if name in config["domains_out"]]
        pairs += [(f"encoder_embeddings.{name}.mod_emb", f"decoder_embeddings.{name}.mod_emb")
                  for name in both]
    for name in config["domains_out"]:
        p = f"decoder_embeddings.{name}"
        pairs.append((f"{p}.token_emb.weight", f"{p}.to_logits.weight"))
    for first, second in pairs:
        if first not in tensors and second in tensors:
            tensors[first] = tensors[second]
        elif second not in tensors and first in tensors:
            tensors[second] = tensors[first]


def _stored_specs(stored: Any, config: dict[str, Any]) -> list[ModalitySpec]:
    """Modalities of `modalities.json`."""
    if not isinstance(stored, list):
        raise ValueError("modalities.json holds no list")
    try:
        specs = [typed(ModalitySpec, spec, "a modality") for spec in stored]
    except ValueError as error:
        raise ValueError(f"modalities.json was written by another version: {error}") from error
    for spec in specs:
        large = [x for x in dataclasses.astuple(spec) if type(x) is int and not 0 <= x < 1 << 24]
        if large:
            raise ValueError(f"modalities.json: {spec.name} with {large[0]} of anything")
    for key, names in (("domains_in", [s.name for s in specs if s.is_input]),
                       ("domains_out", [s.name for s in specs if s.is_target])):
        if sorted(names) != sorted(config[key]):
            raise ValueError(f"modalities.json and {key} of config.json name different "
                             f"modalities: {sorted(set(names) ^ set(config[key]))}")
    return specs


def _spec(
    name: str, config: dict[str, Any], tensors: dict[str, Tensor], lengths: Lengths,
    problems: _Problems,
) -> ModalitySpec | None:
    """The modality `name` from the shapes of its tensors; None notes what is missing for that."""
    is_input, is_target = name in config["domains_in"], name in config["domains_out"]
    prefix = f"{'encoder' if is_input else 'decoder'}_embeddings.{name}"
    sources = [key for key in ("proj", "emb_proj", "token_emb")
               if f"{prefix}.{key}.weight" in tensors]
    shapes = {f"{prefix}.pos_emb": f"[1, positions, {config['dim']}]",
              f"{prefix}.{sources[0] if sources else 'token_emb'}.weight": "[rows, columns]"}
    for key, shape in shapes.items():
        if key not in tensors:
            problems.missing[key] = shape
            problems.unread.add(name)
        elif tensors[key].dim() != shape.count(",") + 1:
            problems.misshapen[key] = f"{list(tensors[key].shape)}, not {shape}"
            problems.unread.add(name)
    if name in problems.unread:
        return None
    positions, weight = (tensors[key] for key in shapes)
    positions = positions[0]
    if sources[0] == "token_emb" and name in lengths and not _is_sequence(positions):
        problems.misshapen[f"{prefix}.pos_emb"] = (f"{list(positions.shape)}, no sine-cosine "
            "table: learned positions of sequences are not supported")  # fmt: skip
        problems.unread.add(name)
        return None
    common: dict[str, Any] = {"name": name, "is_input": is_input, "is_target": is_target}
    if sources[0] == "proj":
        patch = _patch(weight.shape[1], config["patch_size"], name)
        return ModalitySpec(kind="pixels", max_tokens=len(positions), patch_size=patch,
                            channels=weight.shape[1] // patch**2, **common)
    longest, limit = lengths.get(name, (256, 256))
    if sources[0] == "emb_proj":
        return ModalitySpec(kind="seq_emb", max_tokens=longest, channels=weight.shape[1], **common)
    common["vocab_size"] = len(weight)
    if _is_sequence(positions):
        return ModalitySpec(kind="seq", max_tokens=longest, max_length=limit,
                            chunk=CHUNKS.get(name, 0), **common)
    return _grid(positions, common)


def _grid(positions: Tensor, common: dict[str, Any]) -> ModalitySpec:
    spec = ModalitySpec(kind="img", max_tokens=len(positions), **common)
    computed = _same_table(positions, position_table(spec, positions.shape[1]))
    return dataclasses.replace(spec, learned_positions=not computed)


def _is_sequence(positions: Tensor) -> bool:
    """Whether a table [rows, D] is that of sequences; a grid of as many rows is none."""
    return len(positions) == POSITION_ROWS \
        and _same_table(positions, sincos_1d(*positions.shape))


def _same_table(positions: Tensor, table: Tensor) -> bool:
    """Whether stored positions are a computed table, as far as their precision can tell."""
    close = torch.finfo(positions.dtype).eps if positions.is_floating_point() else 0.0
    return positions.shape == table.shape and torch.allclose(
        positions.float(), table, atol=max(1e-4, close))


def _patch(width: int, patch: int, name: str) -> int:
    """Side of the patches of a projection of `width` values, of colours if that is possible."""
    for side in (patch, math.isqrt(width // 3)):
        if width == 3 * side**2:
            return side
    if width % patch**2:
        raise ValueError(f"{name}: patches of {width} values are not of {patch} x {patch} pixels")
    return patch


def _own_config(
    config: dict[str, Any], specs: Sequence[ModalitySpec], tensors: dict[str, Tensor]
) -> FourMConfig:
    def same(prefix: str) -> bool:
        first, second = (tensors.get(f"{prefix}.{key}.weight") for key in ("token_emb",
                                                                           "to_logits"))
        return first is None or second is None or torch.equal(first, second)

    tied = all(same(f"decoder_embeddings.{spec.name}") for spec in specs
               if spec.is_target and spec.kind == "seq")
    registers = tensors.get("register_tokens")
    stated = config.get("num_register_tokens", 0)
    count = registers.shape[1] if registers is not None and not stated else stated
    return FourMConfig(
        modalities=tuple(specs), bias=bool(config["norm_bias"]), tie_embeddings=tied,
        num_register_tokens=count, **{key: config[key] for key in SIZES},
    )
