"""What labelers say of pictures, some of them knowing what others said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from tasks.evaluation.truth import Values

if TYPE_CHECKING:
    from models.labelers import Labeler


def told(values: Values, teachers: Mapping[str, Labeler], names: Iterable[str]) -> Values:
    """Values, and those of further modalities as their labelers see the pictures.

    A labeler that looks at other labels finds those that are there already, and those of the
    labelers that look at pictures alone.

    Args:
        values: "rgb", and whatever is known beside it; one value a picture.
        teachers: Labelers by the modality that they write.
        names: Modalities to have; those without a labeler are passed over.
    """
    found = dict(values)
    wanted = [name for name in names if name in teachers]
    for name in sorted(wanted, key=lambda name: _looks_further(teachers[name])):
        if name not in found:
            said = _label(teachers[name], found)
            found |= {other: labels for other, labels in said.items() if other not in found}
    return found


def _looks_further(labeler: Labeler) -> bool:
    return bool(labeler.also_reads) or labeler.reads != ("rgb",)


def _label(labeler: Labeler, values: Values) -> Values:
    seen = [name for name in (*labeler.reads, *labeler.also_reads) if name in values]
    rows = zip(*(values[name] for name in seen), strict=True)
    return labeler.label_samples([dict(zip(seen, row, strict=True)) for row in rows])
