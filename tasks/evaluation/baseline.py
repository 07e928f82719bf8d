"""The best predictions that ignore the input: what a model has to beat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from models.fourm.ensemble import Similarity, medoid, vote_classes
from tasks.metrics import edge_f1

_CAPTIONS = 150  # candidates; comparing captions costs the square
_EDGES = 100  # maps that a constant edge map is chosen on


def constant(modality: str, labels: Sequence[Any], similarity: Similarity) -> Any:
    """One value for every picture.

    Args:
        modality: Name in the catalogue.
        labels: Values of the training set.
        similarity: Likeness of two captions.

    Returns:
        The median depth, mean normal or feature, most frequent class and mean colour of each
        pixel; edges where they are frequent; no boxes, people or instances; the mean of each
        colour of a palette and the median of each metadata field; and the caption that is right
        about most others.
    """
    if modality == "det":
        return {"instances": []}
    if modality == "human_poses":
        return {"humans": []}
    if modality == "sam_instance":
        return {"size": list(labels[0]["size"]), "instances": []}
    if modality == "caption":
        return medoid([text for text, _ in Counter(labels).most_common(_CAPTIONS)], similarity)
    if modality == "color_palette":
        numbers = sorted({number for value in labels for number in value})
        means = {n: np.mean([v[n] for v in labels if n in v], axis=0) for n in numbers}
        return {number: np.rint(colors).astype(int).tolist() for number, colors in means.items()}
    if modality == "metadata":
        names = dict.fromkeys(name for value in labels for name in value)
        return {n: float(np.median([v[n] for v in labels if n in v])) for n in names}
    stacked = np.stack(labels)
    if modality == "semseg":
        return vote_classes(stacked)
    if modality == "depth":
        return np.median(stacked, axis=0).astype(np.float32)
    if modality.endswith("_edge"):
        return _frequent_edges(stacked[:_EDGES])
    mean = stacked.astype(np.float32).mean(0)
    if modality == "normal":
        return mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-6)
    return np.rint(mean).astype(np.uint8) if stacked.dtype == np.uint8 else mean


def _frequent_edges(maps: np.ndarray) -> np.ndarray:
    """Edges at the pixels that have one most often, as many as fit the maps best."""
    often = maps.astype(np.float32).mean(0)
    guesses = [
        np.where(often >= np.quantile(often, share), 255, 0).astype(np.uint8)
        for share in (0.0, 0.5, 0.7, 0.8, 0.9, 0.95)
    ]
    fits = [edge_f1(np.broadcast_to(guess, maps.shape), maps) for guess in guesses]
    return guesses[int(np.argmax(fits))]
