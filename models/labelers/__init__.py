"""Labelers: off-the-shelf networks that write modalities for images."""

from models.labelers.base import Image, Labeler, LabelerSpec
from models.labelers.registry import (
    KINDS,
    PRESETS,
    kinds,
    labeler_class,
    load_labeler,
    outputs,
    preset,
    weights_revision,
)

__all__ = [
    "KINDS",
    "PRESETS",
    "Image",
    "Labeler",
    "LabelerSpec",
    "kinds",
    "labeler_class",
    "load_labeler",
    "outputs",
    "preset",
    "weights_revision",
]
