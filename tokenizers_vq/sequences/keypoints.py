"""People as 2-D keypoints, for labels without a body model: `none`, or for each person

    human v0= v1= v2= v3= pose      box in 0..1
    v0={x} v1={y}  or  none         each of 17 keypoints in the order of COCO

`none` is a keypoint that was not seen. No released model reads this; its words are those of the
released poses, and a person takes at most 40 of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers_vq.sequences.words import BINS, Word, box_words, number, numbers, read_words

KEYPOINTS = 17
MIN_SCORE = 0.3
"""Keypoints below this confidence count as not seen."""


def keypoints_to_string(
    humans: Iterable[Mapping[str, Any]], *, bins: int = BINS, min_score: float = MIN_SCORE
) -> str:
    """Writes people in the given order.

    Args:
        humans: `{"box": [xmin, ymin, xmax, ymax], "keypoints": 17 x [x, y, score]}` each, in 0..1
            of the crop; a keypoint outside of it counts as not seen.
        bins: Levels per axis.
        min_score: Least confidence of a keypoint that is written.

    Raises:
        ValueError: if a person has another number of keypoints.
    """
    lines = []
    for human in humans:
        if len(human["keypoints"]) != KEYPOINTS:
            raise ValueError(f"{len(human['keypoints'])} keypoints: a person has {KEYPOINTS}")
        words = (_word(keypoint, bins, min_score) for keypoint in human["keypoints"])
        lines.append(" ".join(["human", box_words(human["box"], bins), "pose", *words]))
    return " ".join(lines) or "none"


def _word(keypoint: Sequence[float], bins: int, min_score: float) -> str:
    x, y, score = keypoint
    if score < min_score or not (0 <= x <= 1 and 0 <= y <= 1):
        return "none"
    return f"{number(0, x * (bins - 1), bins)} {number(1, y * (bins - 1), bins)}"


def string_to_keypoints(text: str, *, bins: int = BINS) -> list[dict[str, Any]]:
    """Reads people; one without an upright box or with missing keypoints is passed over.

    Returns:
        `{"box", "score": 1.0, "keypoints"}` each; the score of a keypoint is 1 if seen, else 0.
    """
    words = read_words(text)
    humans = []
    for start, word in enumerate(words):
        box = numbers(words, start + 1, (0, 1, 2, 3)) if word.text == "human" else None
        if box is None or box[2] < box[0] or box[3] < box[1]:
            continue
        keypoints = _read(words, start + 5, bins)
        if keypoints is not None:
            humans.append({"box": _shares(box, bins), "score": 1.0, "keypoints": keypoints})
    return humans


def _shares(found: Iterable[int], bins: int) -> list[float]:
    return [min(x / (bins - 1), 1.0) for x in found]


def _read(words: Sequence[Word], at: int, bins: int) -> list[list[float]] | None:
    if at >= len(words) or words[at].text != "pose":
        return None
    at += 1
    keypoints: list[list[float]] = []
    while len(keypoints) < KEYPOINTS and at < len(words):
        place = numbers(words, at, (0, 1))
        if place is not None:
            keypoints.append([*_shares(place, bins), 1.0])
            at += 2
        elif words[at].text == "none":
            keypoints.append([0.0, 0.0, 0.0])
            at += 1
        else:
            return None
    return keypoints if len(keypoints) == KEYPOINTS else None
