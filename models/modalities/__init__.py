"""The catalogue of modalities: one file here, or one entry point of a user's package, each.

A package adds a modality by an entry point of group ``fourm.modalities`` that names a
:class:`~models.modalities.base.Modality` object.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points

from models.modalities.base import Modality
from tokenizers_vq.sequences.form import TextForm

__all__ = ["Modality", "get", "is_embedded", "names", "text_form"]


@cache
def _catalogue() -> dict[str, Modality]:
    found: dict[str, Modality] = {}
    for info in pkgutil.iter_modules(__path__):
        if info.name != "base" and not info.name.startswith("_"):
            module = importlib.import_module(f"{__name__}.{info.name}")
            found[module.MODALITY.name] = module.MODALITY
    for point in entry_points(group="fourm.modalities"):
        modality = point.load()
        if not isinstance(modality, Modality):
            raise ValueError(f"entry point {point.name!r} must name a Modality, not {modality!r}")
        if modality.name in found:
            raise ValueError(f"modality {modality.name!r} of {point.value!r} exists already")
        found[modality.name] = modality
    return found


def names() -> list[str]:
    """All known modalities, sorted."""
    return sorted(_catalogue())


def get(name: str) -> Modality:
    """The modality of that name.

    Raises:
        ValueError: when there is none; the message lists the valid names.
    """
    try:
        return _catalogue()[name]
    except KeyError:
        raise ValueError(f"unknown modality {name!r}; choose from {', '.join(names())}") from None


def text_form(name: str) -> TextForm | None:
    """How values of a modality are written as text; None of others, and of unknown names."""
    found = _catalogue().get(name)
    return None if found is None else found.text


def is_embedded(name: str) -> bool:
    """Whether a model reads the labels themselves, as a sequence of vectors without tokens."""
    found = _catalogue().get(name)
    return found is not None and found.kind == "sequence" and found.text is None
