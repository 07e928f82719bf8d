"""Human poses: `none`, or for each person a box and its body model's parameters.

    human v0= v1= v2= v3=     box in 0..1
    pose + 8 codes            of the pose tokenizer, 0..1023
    global + 9 numbers        rotation matrix of the body, row by row, -1..1
    camera + 3 numbers        -1..19
    shape + 10 numbers        -3..3

The four groups follow the box in any order; 39 words a person.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers_vq.sequences.words import (
    BINS,
    Word,
    box_words,
    code_word,
    number,
    numbers,
    read_codes,
    read_words,
    run,
)

GROUPS = ("pose", "global", "camera", "shape")
_POSE_CODES = 8


class _Range(NamedTuple):
    """A group of equally spaced numbers."""

    size: int
    low: float
    high: float

    def write(self, values: Iterable[float]) -> str:
        half = (BINS - 1) / (self.high - self.low)
        zero = -self.low * half
        return " ".join(number(0, half * x + zero) for x in values)

    def read(self, words: Sequence[Word]) -> list[float] | None:
        if len(words) != self.size or any(word.axis for word in words):
            return None
        step = (self.high - self.low) / (BINS - 1)
        return [self.low + min(word.number, BINS - 1) * step for word in words]


_RANGES = {
    "global": _Range(9, -1.0, 1.0),
    "camera": _Range(3, -1.0, 19.0),
    "shape": _Range(10, -3.0, 3.0),
}


def _flat(values: Any) -> list[float]:
    """Numbers of nested lists, in order."""
    if isinstance(values, (list, tuple)):
        return [x for value in values for x in _flat(value)]
    return [float(values)]


def _group(person: Mapping[str, Any], name: str) -> str:
    if name == "pose":
        codes = person["pose"]
        if len(codes) != _POSE_CODES:
            raise ValueError(f"{len(codes)} codes: a pose has {_POSE_CODES}")
        return " ".join([name, *map(code_word, codes)])
    values = _flat(person[name])
    if len(values) != _RANGES[name].size:
        raise ValueError(f"{name} has {len(values)} numbers instead of {_RANGES[name].size}")
    return f"{name} {_RANGES[name].write(values)}"


def poses_to_string(
    people: Sequence[Mapping[str, Any]], orders: Sequence[Sequence[int]] | None = None
) -> str:
    """Writes people in the given order.

    Args:
        people: `{"box": [xmin, ymin, xmax, ymax] in 0..1, "pose": 8 codes, "global": 9 numbers
            or 3 x 3, "camera": 3, "shape": 10}` each. Numbers beyond a group's range are clipped.
        orders: For each person the order of the groups, as indices into `GROUPS`.

    Raises:
        ValueError: if a group has another number of values, or a code is out of range.
    """
    if not people:
        return "none"
    lines = []
    for i, person in enumerate(people):
        order = range(len(GROUPS)) if orders is None else orders[i]
        groups = (_group(person, GROUPS[index]) for index in order)
        lines.append(" ".join(["human", box_words(person["box"]), *groups]))
    return " ".join(lines) + " "  # released texts end in a blank


def string_to_poses(text: str) -> list[dict[str, Any]]:
    """Reads people; one without an upright box is passed over, an incomplete group left out."""
    words = read_words(text)
    starts = [i for i, word in enumerate(words) if word.text == "human"]
    people = []
    for start, end in zip(starts, [*starts[1:], len(words)], strict=False):
        coordinates = numbers(words, start + 1, (0, 1, 2, 3))
        if coordinates is None:
            continue
        box = [min(x / (BINS - 1), 1.0) for x in coordinates]
        if box[2] < box[0] or box[3] < box[1]:
            continue
        people.append({"box": box, **_read_groups(words[start + 5 : end])})
    return people


def _read_groups(words: Sequence[Word]) -> dict[str, list[Any]]:
    readers: dict[str, tuple[int, Callable[[Sequence[Word]], list[Any] | None]]] = {
        "pose": (_POSE_CODES, lambda found: read_codes(found, _POSE_CODES)),
        **{name: (each.size, each.read) for name, each in _RANGES.items()},
    }
    groups: dict[str, list[Any]] = {}
    for i, word in enumerate(words):
        if word.text in readers and word.text not in groups:
            count, read = readers[word.text]
            values = read(run(words, i + 1, count))
            if values is not None:
                groups[word.text] = values
    return groups


def people_of(data: Mapping[str, Any] | Sequence[Any]) -> list[dict[str, Any]]:
    """People of a released file `{bbox_xyxy, pred_cam, pose_tokenized, pred_smpl_params}`.

    Boxes stay in the file's pixels; an empty list or object means that there is nobody.
    """
    if not isinstance(data, Mapping) or not data:
        return []
    body = data["pred_smpl_params"]
    rows = zip(
        data["bbox_xyxy"], data["pose_tokenized"], body["global_orient"], data["pred_cam"],
        body["betas"], strict=True,
    )
    return [
        {"box": list(box), "pose": list(pose), "global": _flat(turn), "camera": list(camera),
         "shape": list(shape)}
        for box, pose, turn, camera, shape in rows
    ]
