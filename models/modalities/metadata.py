"""Metadata: up to 21 numbers about a picture and its labels, as the released 4M-21 sets name them.

The value is `{field: number}`; a field that could not be computed, because its label is missing,
is absent. `FIELDS` lists the names in the order of their type numbers 0..20.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from infra.strict import read_json
from models.modalities._boxes import is_number
from models.modalities.base import Modality, to_json
from tokenizers_vq.sequences.form import TextForm
from tokenizers_vq.sequences.metadata import FIELDS as _FIELDS
from tokenizers_vq.sequences.metadata import LEVELS, metadata_to_string, string_to_metadata

FIELDS = tuple(_FIELDS)

Metadata = dict[str, float]


def check(value: object) -> Metadata:
    """The value itself where it is one.

    Raises:
        ValueError: A field is unknown, or no finite number.
    """
    if not isinstance(value, dict):
        raise ValueError("metadata must be an object of fields and numbers")
    if unknown := sorted(value.keys() - set(FIELDS)):
        raise ValueError(f"metadata has no field {unknown[0]!r}; there are {', '.join(FIELDS)}")
    for name, number in value.items():
        if not is_number(number):
            raise ValueError(f"metadata field {name} is {number!r}, not a finite number")
    return value


def _render(value: Metadata) -> np.ndarray:
    image = Image.new("RGB", (220, 12 * len(FIELDS) + 4), "white")
    lines = [f"{name} {value[name]:.4g}" for name in FIELDS if name in value]
    ImageDraw.Draw(image).text((4, 2), "\n".join(lines), fill="black", font_size=9)
    return np.asarray(image)


MODALITY = Modality(
    name="metadata",
    kind="sequence",
    ext="json",
    encode=lambda value: to_json(check(value)),
    decode=lambda data: check(read_json(data)),
    crop=lambda value, box, size: value,
    render=_render,
    description="up to 21 numbers by name; those that could not be computed are absent",
    text=TextForm(
        write=lambda value, page: metadata_to_string(value, bins=page.bins),
        read=lambda text, page: string_to_metadata(text),
        min_bins=LEVELS,
        whole=True,
    ),
)
