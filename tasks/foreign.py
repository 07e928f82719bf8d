"""Token sets of the released 4M code, told from their folders: they carry no description.

    root/<modality>/shard-00000.tar    .npy int16 [crops, tokens], .jpg, .txt, .json
    root/crop_settings/...             .npy int [crops, 5]
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from typing import Any

from infra.manifest import output_of
from infra.shards import read_tar, split_name
from infra.store import Store, json_bytes
from infra.strict import read_npy
from tasks.layouts import CROPS, Part

VOCABULARIES = {
    "tok_rgb": 16_384, "tok_depth": 8192, "tok_normal": 8192, "tok_semseg": 4096,
    "tok_clip": 8192, "tok_canny_edge": 8192, "tok_sam_edge": 8192, "tok_dinov2": 8192,
    "tok_imagebind": 8192, "tok_dinov2_global": 8192, "tok_imagebind_global": 8192,
}  # fmt: skip
"""Codes of the released tokenizers, by modality without its resolution."""
PATCH = 16
_FILES = frozenset({"jpg", "png", "txt", "json"})


def infer(source: Store) -> dict[str, Any]:
    """What a description of the set would say.

    The windows of such a set are its own, so its pictures are imported but not published with
    the tokens; texts and boxes are imported as labels, since their tokens are made when loading.

    Raises:
        ValueError: there are no such folders, or they hold different shards.
    """
    sizes = source.sizes("")
    shards: dict[str, list[str]] = {}
    for path in sizes:
        if found := re.fullmatch(r"([^/]+)/shard-(\d{5})\.tar", path):
            shards.setdefault(found[1], []).append(found[2])
    if not shards:
        raise ValueError(
            f"{source.url} holds neither fourm.json nor <modality>/shard-00000.tar; a plain "
            "WebDataset of pictures comes in through `fourm ingest --format webdataset`"
        )
    numbers = max(shards.values(), key=len)
    for name, there in shards.items():
        if there != numbers or [int(n) for n in there] != list(range(len(there))):
            raise ValueError(
                f"{source.url}: {name} holds shards {there[0]} to {there[-1]}, {len(there)} of "
                f"them; expected {len(numbers)}, counted from 00000 without a gap"
            )
    named = _modalities(shards)
    parts = [_part(source, name, named[name]) for name in sorted(shards)]
    tokens = [part for part in parts if part.is_tokens]
    rows = [(path, size) for path, size in sizes.items() if path.endswith(".tar")]
    return {
        "version": 1,
        "layout": "ml-4m",
        "id": hashlib.sha256(json_bytes(rows)).hexdigest(),
        "name": "main",
        "parts": [part.to_dict() for part in parts],
        "modalities": [part.modality for part in tokens],
        "crops": _crops(tokens),
        "tokenizers": {part.modality.removeprefix("tok_"): _tokenizer(part) for part in tokens},
        "splits": {"train": list(range(len(numbers)))},
        "shards": [
            {"shard": int(number), "samples": 0, "left_out": [], "sha256": {}}
            for number in numbers
        ],
    }


def _modalities(folders: Iterable[str]) -> dict[str, str]:
    """Folder to modality: tok_rgb of tok_rgb@224, and tok_rgb@448 where it lies beside that."""
    found: dict[str, str] = {}
    sides = {name: re.search(r"@(\d+)$", name) for name in sorted(folders)}
    for name in sorted(sides, key=lambda each: int(side[1]) if (side := sides[each]) else 0):
        base = re.sub(r"@\d+$", "", name)
        found[name] = name if base in found.values() else base
    return found


def _part(source: Store, name: str, modality: str) -> Part:
    path = f"{name}/shard-00000.tar"
    first = next(read_tar(source.read(path), source=source.full(path)), None)
    if first is None:
        raise ValueError(f"{source.full(path)} is empty")
    extension = split_name(first[0])[1]
    if extension == "npy" and name != CROPS and name.startswith("tok_"):
        tokens = read_npy(first[1], source.full(path))
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise ValueError(f"{source.full(path)}: tokens are {tokens.dtype} {tokens.shape}")
        columns = tuple((f"crop{i}", "uint16", tokens.shape[1]) for i in range(len(tokens)))
        vocabulary = str(VOCABULARIES.get(output_of(modality), 1 << 15))
        metadata = {
            "modality": output_of(modality),
            "tokenizer": "",
            "tokenizer_fingerprint": "",
            "vocab_size": vocabulary,
        }
        return Part(name, modality, columns, tuple(sorted(metadata.items())))
    if extension not in _FILES and name != CROPS:
        raise ValueError(f"{source.full(path)}: {first[0]} is neither tokens nor a known file")
    return Part(name, modality)


def _tokenizer(part: Part) -> dict[str, Any]:
    vocabulary = int(dict(part.metadata)["vocab_size"])
    return {
        "path": "",
        "fingerprint": "",
        "vocab_size": vocabulary,
        "num_tokens": part.columns[0][2],
    }


def _crops(tokens: list[Part]) -> dict[str, Any] | None:
    """Number of crops and their side, told from the finest grid of tokens of the set's own size."""
    if not tokens:
        return None
    longest = max(part.columns[0][2] or 0 for part in tokens if "@" not in part.modality)
    size = math.isqrt(longest) * PATCH
    return {"num_crops": len(tokens[0].columns), "min_scale": 0.8, "hflip": True, "size": size}
