"""Scenes in words: captions, and how much of a caption is right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from infra.scenes.world import COLORS, MATERIALS, SHAPES, SIZES, Camera, SceneObject

ATTRIBUTES = ("size", "color", "material", "shape")

_WORDS = {"size": SIZES, "color": tuple(COLORS), "material": MATERIALS, "shape": SHAPES}
_KIND = {word: kind for kind, words in _WORDS.items() for word in words}


def describe(solid: SceneObject) -> str:
    """Name one solid, as in "a large red metal cube"."""
    return f"a {solid.size} {solid.color} {solid.material} {solid.shape}"


def _relation(first: SceneObject, second: SceneObject, camera: Camera) -> str:
    right, _, forward = camera.basis()
    across = np.subtract(second.position, first.position)
    ground = forward[:2] / np.linalg.norm(forward[:2])
    depth, sideways = float(across @ ground), float(across @ right[:2])
    if abs(depth) <= abs(sideways):
        return "left of"
    return "in front of" if depth > 0 else "behind"


def caption(objects: Sequence[SceneObject], camera: Camera) -> str:
    """Describe solids in the order given, from left to right.

    Neighbours are joined by a relation that holds: "left of", or "in front of" and "behind"
    where they are further apart along the view than across it.

    Args:
        objects: Solids from left to right on the image.
        camera: The camera that sees them.
    """
    if not objects:
        return "an empty room"
    words = [describe(objects[0])]
    for first, second in pairwise(objects):
        words += [_relation(first, second, camera), describe(second)]
    return " ".join(words)


def parse_caption(text: str) -> list[dict[str, str]]:
    """Read the solids that a text names.

    Args:
        text: Any text. Words outside of the scenes' vocabulary are ignored.

    Returns:
        One mapping per named shape, with the keys "size", "color", "material" and "shape";
        an attribute that the text does not give is "".
    """
    found: list[dict[str, str]] = []
    pending = dict.fromkeys(ATTRIBUTES, "")
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in ("left", "front", "behind"):
            pending = dict.fromkeys(ATTRIBUTES, "")
        if word not in _KIND:
            continue
        pending[_KIND[word]] = word
        if _KIND[word] == "shape":
            found.append(pending)
            pending = dict.fromkeys(ATTRIBUTES, "")
    return found


def caption_score(predicted: str, truth: str) -> float:
    """Share of the solids' attributes that a caption gets right.

    Solids of both texts are paired in the best way; solids that are missing or invented
    count as wrong in all their attributes.

    Args:
        predicted: A text, possibly garbage.
        truth: A caption.

    Returns:
        A share in 0..1; 1 if neither text names a solid.
    """
    from scipy.optimize import linear_sum_assignment

    guesses, facts = parse_caption(predicted), parse_caption(truth)
    if not guesses or not facts:
        return float(not guesses and not facts)
    right = np.array(
        [[sum(g[k] == f[k] != "" for k in ATTRIBUTES) for f in facts] for g in guesses]
    )
    rows, columns = linear_sum_assignment(right, maximize=True)
    total = len(ATTRIBUTES) * max(len(guesses), len(facts))
    return float(right[rows, columns].sum() / total)
