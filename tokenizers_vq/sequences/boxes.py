"""Boxes as text and back, in the words of Pix2Seq (Chen et al., arXiv 2109.10852).

    v0={xmin} v1={ymin} v2={xmax} v3={ymax} {class} v0=...

Coordinates are fractions of the crop on `bins` levels, nearest corner first. Reading is tolerant,
for the text may come from a model: what is no complete, upright box is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenizers_vq.sequences.words import AXES, name_words

if TYPE_CHECKING:
    from tokenizers_vq.text import TextTokenizer

MIN_SCORE = 0.6
"""Detections below this confidence are not written."""

_BOX = re.compile(
    r"v0=(\d{1,6})\s+v1=(\d{1,6})\s+v2=(\d{1,6})\s+v3=(\d{1,6})\s+"
    r"(\S.*?)(?=\s*(?:v\d=\d|\[(?:PAD|UNK|SOS|EOS|S_\d+)\]|$))",
    re.DOTALL,
)


def det_to_string(
    instances: Iterable[dict[str, Any]], *, bins: int = 1000, min_score: float = MIN_SCORE
) -> str:
    """Writes boxes as one line of text.

    Args:
        instances: `{"box": [xmin, ymin, xmax, ymax] in 0..1, "class_name", "score"}` each; boxes
            are clipped to 0..1; empty ones, and those of a class without a name, are dropped.
        bins: Levels per axis; a coordinate x becomes round(x * (bins - 1)), half to even.
        min_score: Least score that is written.
    """
    kept = []
    for instance in instances:
        if instance.get("score", 1.0) < min_score:
            continue
        x0, y0, x1, y1 = (min(max(float(c), 0.0), 1.0) for c in instance["box"])
        if x1 > x0 and y1 > y0 and (name := name_words(instance["class_name"])):
            kept.append(((x0, y0, x1, y1), name))
    kept.sort(key=lambda item: item[0][0] ** 2 + item[0][1] ** 2)
    return " ".join(
        " ".join(f"v{axis}={round(c * (bins - 1))}" for axis, c in enumerate(box)) + f" {name}"
        for box, name in kept
    )


def string_to_det(text: str, *, bins: int = 1000) -> dict[str, Any]:
    """Reads boxes from text, also from imperfect text.

    Returns:
        The value of the det modality; scores are 1. Coordinates beyond the last bin are
        clipped; boxes with a missing part or a negative extent are left out.
    """
    instances = []
    for match in _BOX.finditer(text):
        box = [min(int(value) / (bins - 1), 1.0) for value in match.groups()[:4]]
        if box[2] >= box[0] and box[3] >= box[1]:
            instances.append({"box": box, "class_name": match.group(5).strip(), "score": 1.0})
    return {"instances": instances}


def read_boxes(
    ids: Sequence[int], confidence: Sequence[float] | np.ndarray, text: TextTokenizer
) -> list[dict[str, Any]]:
    """Boxes in a token sequence, each scored by the geometric mean of its tokens' confidence.

    What is no complete, upright box is passed over.
    """
    first, bins = text.coordinate_id(0, 0), text.bins
    axis = [(i - first) // bins if first <= i < first + AXES * bins else -1 for i in ids]
    boxes = []
    for start in range(len(ids) - AXES):
        end = start + AXES
        if axis[start:end] != list(range(AXES)):
            continue
        stop = end
        while stop < len(ids) and axis[stop] < 0:
            stop += 1
        box = [(ids[start + k] - first - k * bins) / (bins - 1) for k in range(AXES)]
        if stop == end or box[2] < box[0] or box[3] < box[1]:
            continue
        score = float(np.exp(np.mean(np.log(np.maximum(confidence[start:stop], 1e-9)))))
        name = text.decode(ids[end:stop]).strip()
        boxes.append({"box": box, "class_name": name, "score": score})
    return boxes
