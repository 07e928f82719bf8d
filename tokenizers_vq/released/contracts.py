"""Which values the released tokenizers take, and opening one with its value contract.

The published configuration does not say what a tokenizer is for; its name does.
"""

from __future__ import annotations

import re
from pathlib import Path

from infra.weights import named
from tokenizers_vq.codec import Kind, ValueCodec
from tokenizers_vq.released.checkpoint import build, read_checkpoint
from tokenizers_vq.released.network import ReleasedShape
from tokenizers_vq.tokenizer import Tokenizer

KINDS: dict[str, Kind] = {
    "rgb": "rgb",
    "depth": "depth",
    "normal": "normal",
    "canny_edge": "edge",
    "sam_edge": "edge",
    "semseg": "semseg",
    "clip": "feature",
    "dinov2": "feature",
    "imagebind": "feature",
    "dinov2_global": "vector",
    "imagebind_global": "vector",
    "human_poses": "vector",
    "sam_instance": "mask",
}
"""Modalities with a released tokenizer, and the type of their values."""

_NAMES = (
    (r"dinov2.*global", "dinov2_global"),
    (r"imagebind.*global", "imagebind_global"),
    (r"dinov2", "dinov2"),
    (r"imagebind", "imagebind"),
    (r"clip", "clip"),
    (r"human[-_]?poses?", "human_poses"),
    (r"sam[-_]instance", "sam_instance"),
    (r"sam[-_]edge", "sam_edge"),
    (r"edge", "canny_edge"),
    (r"semseg", "semseg"),
    (r"(?<![a-z])(rgb|depth|normal)(?![a-z])", ""),
)


def modality_of(path: str | Path) -> str:
    """The modality that a checkpoint's folder or file is named after.

    Raises:
        ValueError: if no part of the path names one.
    """
    for part in reversed(Path(path).parts):
        for pattern, name in _NAMES:
            if match := re.search(pattern, part.lower()):
                return name or match[1]
    raise ValueError(
        f"{path}: the name tells no modality; pass modality= one of {', '.join(KINDS)}"
    )


def contract(modality: str, shape: ReleasedShape) -> ValueCodec:
    """The values that the released tokenizer of a modality takes.

    Features are taken as they are; class ids are shifted by one, so that unlabelled (255) is 0;
    depth is standardised, hence decoded without its scale.

    Raises:
        ValueError: for an unknown modality, or one whose values do not fit the network.
    """
    if modality not in KINDS:
        raise ValueError(f"modality={modality!r}: choose one of {', '.join(KINDS)}")
    kind = KINDS[modality]
    wanted = {"rgb": 3, "depth": 1, "normal": 3, "edge": 1, "mask": 1}.get(kind)
    if (kind == "semseg") != bool(shape.num_classes) or wanted not in (None, shape.channels):
        raise ValueError(
            f"this is no {modality} tokenizer: it takes {shape.channels} channels"
            f"{' of embedded classes' if shape.num_classes else ''}"
        )
    if kind in ("feature", "vector"):
        return ValueCodec(kind=kind, mean=(0.0,) * shape.channels, std=(1.0,) * shape.channels)
    return ValueCodec(
        kind=kind, depth_mode="standardise", class_offset=1 if kind == "semseg" else 0
    )


def load(
    path: str | Path, *, modality: str | None = None, head_width: int = 64,
    precision: str = "fp32", ema: bool = False,
) -> Tokenizer:
    """Opens a released tokenizer; `tokenizers_vq.load` documents the arguments."""
    name = modality_of(path) if modality is None else modality
    if name not in KINDS:
        raise ValueError(f"modality={name!r}: choose one of {', '.join(KINDS)}")
    config, tensors = read_checkpoint(path, ema=ema)
    with named(path):
        net = build(config, tensors, head_width=head_width)
        return Tokenizer(name, net, contract(name, net.config), precision)
