"""Kinds of labelers, presets of them, and what identifies their weights.

A kind is a class here, or the `labeler` of a modality that a user's package adds: such a modality
has a labeler of its own name in every preset.
"""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path

from models.labelers.base import COMPUTED, Labeler, LabelerSpec
from models.labelers.networks import PRESETS as NETWORKS
from models.labelers.networks import Network

KINDS = {
    "depth": "models.labelers.depth:DepthLabeler",
    "normal": "models.labelers.normal:NormalLabeler",
    "semseg": "models.labelers.semseg:SemsegLabeler",
    "det": "models.labelers.detection:DetectionLabeler",
    "caption": "models.labelers.caption:CaptionLabeler",
    "clip": "models.labelers.features:FeatureLabeler",
    "color_palette": "models.labelers.palette:PaletteLabeler",
    "canny_edge": "models.labelers.canny:CannyLabeler",
    "metadata": "models.labelers.metadata:MetadataLabeler",
    "dinov2": "models.labelers.features:FeatureLabeler",
    "imagebind": "models.labelers.features:FeatureLabeler",
    "sam": "models.labelers.sam:SamLabeler",
    "human_poses": "models.labelers.pose:PoseLabeler",
    "t5_caption": "models.labelers.t5:T5Labeler",
}
"""Class of each kind of labeler."""

OUTPUTS: dict[str, tuple[str, ...]] = {
    "dinov2": ("dinov2", "dinov2_global"),
    "imagebind": ("imagebind", "imagebind_global"),
    "sam": ("sam_instance", "sam_edge"),
}
"""Modalities of the kinds that write others than the one of their name."""

PRESETS = tuple(NETWORKS)


def outputs(kind: str) -> tuple[str, ...]:
    """Modalities that a kind of labeler writes."""
    return OUTPUTS.get(kind, (kind,))


def added() -> dict[str, Network]:
    """Labelers that modalities of users' packages bring along, by the modality's name."""
    from models import modalities

    found = {}
    for name in modalities.names():
        modality = modalities.get(name)
        if modality.labeler and name not in KINDS:
            found[name] = Network(
                model_id=modality.model_id or COMPUTED, licence="its own", resolution="its own"
            )
    return found


def kinds() -> list[str]:
    """All kinds of labelers, those of users' packages included."""
    return [*KINDS, *added()]


def preset(name: str) -> dict[str, LabelerSpec]:
    """Return the labelers of a preset by kind.

    Args:
        name: "scenes" (the shipped weights, for rendered scenes, and what is computed), "modern"
            or "released" (hub models for photographs: permissive ones, or those that 4M used as
            far as they load; pin their `revision` for a run that must be repeatable).

    Raises:
        ValueError: There is no such preset.
    """
    if name not in NETWORKS:
        raise ValueError(f"no labeler preset {name!r}; there are {', '.join(PRESETS)}")
    return {
        kind: LabelerSpec(
            name=kind,
            outputs=outputs(kind),
            model_id=network.model_id,
            revision=network.revision,
            batch_size=32 if name == "scenes" else 8,
            options=dict(network.options),
        )
        for kind, network in {**NETWORKS[name], **added()}.items()
    }


def labeler_class(kind: str) -> type[Labeler]:
    """The class of a kind.

    Raises:
        ValueError: The kind does not exist, or a modality names no labeler.
    """
    from models import modalities

    where = KINDS.get(kind)
    if where is None and kind in added():
        where = modalities.get(kind).labeler
    if where is None:
        raise ValueError(f"no labeler {kind!r}; there are {', '.join(kinds())}")
    module, _, name = where.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"labeler {kind!r}: cannot import {where!r}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Labeler)):
        raise ValueError(f"labeler {kind!r}: {where!r} is no subclass of Labeler")
    return found


def load_labeler(spec: LabelerSpec) -> Labeler:
    """Load the network of a specification, from the hub or a folder.

    Raises:
        ValueError: The kind does not exist, or an option does not fit it.
        OSError: The weights cannot be found.
    """
    return labeler_class(spec.name)(spec)


def weights_revision(spec: LabelerSpec) -> str:
    """Return what identifies the weights: a digest of a folder's files, the hub revision, or the
    version of a class that has none."""
    if spec.model_id == COMPUTED:
        return f"v{labeler_class(spec.name).version}"
    folder = Path(spec.source)
    if not folder.is_dir():
        return spec.revision or "main"
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue  # notes of git, or of the download: they change and the weights do not
        digest.update(name.as_posix().encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
