"""Kinds of labelers, presets of them, and what identifies their weights."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path

from models.labelers.base import SHIPPED, Labeler, LabelerSpec

KINDS = {
    "depth": "models.labelers.depth:DepthLabeler",
    "normal": "models.labelers.normal:NormalLabeler",
    "semseg": "models.labelers.semseg:SemsegLabeler",
    "det": "models.labelers.detection:DetectionLabeler",
    "caption": "models.labelers.caption:CaptionLabeler",
    "clip": "models.labelers.clip:ClipLabeler",
}
"""Class of each kind of labeler; a kind writes the modality of its name."""

_HUB = {
    "depth": "depth-anything/Depth-Anything-V2-Small-hf",
    "normal": "google/tipsv2-b14-dpt",
    "semseg": "facebook/mask2former-swin-base-coco-panoptic",
    "det": "PekingU/rtdetr_v2_r18vd",
    "caption": "Salesforce/blip-image-captioning-base",
    "clip": "openai/clip-vit-base-patch16",
}
_HUB_OPTIONS: dict[str, dict[str, object]] = {"depth": {"scale": "inverse"}}

PRESETS = ("scenes", "modern")


def preset(name: str) -> dict[str, LabelerSpec]:
    """Return the labelers of a preset by kind.

    Args:
        name: "scenes" (the shipped weights, for rendered scenes) or "modern" (hub models for
            photographs; pin their `revision` for a run that must be repeatable).

    Raises:
        ValueError: There is no such preset.
    """
    if name == "scenes":
        return {
            kind: LabelerSpec(
                name=kind, outputs=(kind,), model_id=SHIPPED + kind, precision="auto"
            )
            for kind in KINDS
        }
    if name == "modern":
        return {
            kind: LabelerSpec(
                name=kind,
                outputs=(kind,),
                model_id=_HUB[kind],
                batch_size=8,
                options=_HUB_OPTIONS.get(kind, {}),
            )
            for kind in KINDS
        }
    raise ValueError(f"no labeler preset {name!r}; there are {', '.join(PRESETS)}")


def load_labeler(spec: LabelerSpec) -> Labeler:
    """Load the network of a specification, from the hub or a folder.

    Raises:
        ValueError: The kind does not exist, or an option does not fit it.
        OSError: The weights cannot be found.
    """
    if spec.name not in KINDS:
        raise ValueError(f"no labeler {spec.name!r}; there are {', '.join(KINDS)}")
    module, _, name = KINDS[spec.name].partition(":")
    return getattr(importlib.import_module(module), name)(spec)


def weights_revision(spec: LabelerSpec) -> str:
    """Return what identifies the weights: a digest of a folder's files, or the hub revision."""
    folder = Path(spec.source)
    if not folder.is_dir():
        return spec.revision or "main"
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
