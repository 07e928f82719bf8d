"""Retrieval: a global embedding that 4M predicts from any modality finds its picture by the
teacher's embeddings of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.ui import contact_sheet
from models import modalities
from models.labelers.features import GLOBAL
from tasks.evaluation.rows import Bench, round_trip
from tasks.evaluation.scores import Scores, recall_scores

if TYPE_CHECKING:
    from PIL import Image

SHOWN = ("caption", "depth", "det", "rgb")
"""Modalities whose searches are shown, the first that the model takes."""
_FOUND = 5


def embeddings(bench: Bench) -> list[str]:
    """Global embeddings that the model predicts and a teacher knows."""
    able = set(bench.generator.targets) & set(bench.said)
    return sorted(name for name in able if name.endswith(GLOBAL))


def retrieval(bench: Bench) -> dict[str, dict[str, Any]]:
    """Recall of every search.

    Every picture of the truth is looked for among all of them: the query is predicted from one of
    its modalities, the truth as far as known.

    Returns:
        For each embedding "pictures", their number; "chance" and "tokenizer_bound", the recall of
        the teacher's own embedding as its tokens hold it; and "from": for each modality the
        recall of one sample and of the mean of ten, "fourm" and "fourm_10".
    """
    return {name: _searches(bench, name) for name in embeddings(bench)}


def _searches(bench: Bench, name: str) -> dict[str, Any]:
    gallery = np.stack(bench.said[name])
    count = len(gallery)
    bound = np.stack(round_trip(bench.generator, name, bench.said[name]))
    found: dict[str, Any] = {
        "pictures": count,
        "chance": {f"recall@{rank}": round(min(rank / count, 1.0), 5) for rank in (1, _FOUND)},
        "tokenizer_bound": _rounded(recall_scores(bound, gallery)),
        "from": {},
    }
    for condition in sources(bench, name):
        rows = {"fourm": 1, "fourm_10": bench.samples}
        found["from"][condition] = {
            row: _rounded(recall_scores(queries(bench, condition, name, samples), gallery))
            for row, samples in rows.items()
        }
    return found


def sources(bench: Bench, name: str) -> list[str]:
    """Modalities that an embedding is predicted from: all that the model takes and that pictures
    have, but the embedding's own network."""
    own = {name, name.removesuffix(GLOBAL)}
    known = {"rgb", *bench.truth.values}
    return [given for given in bench.generator.inputs if given in known - own]


def queries(bench: Bench, condition: str, name: str, samples: int) -> np.ndarray:
    """Predicted embeddings [N, C] of all pictures; several samples are averaged."""
    return np.stack(bench.predict(condition, bench.values(condition), name, samples))


def _rounded(scores: Scores) -> Scores:
    return {name: round(value, 5) for name, value in scores.items()}


def search_sheets(bench: Bench, shown: int) -> dict[str, Image.Image]:
    """For each embedding: what was searched with, the picture behind it, and the nearest ones."""
    sheets = {}
    for name in embeddings(bench):
        condition = next((s for s in SHOWN if s in sources(bench, name)), None)
        if condition is not None:
            asked = queries(bench, condition, name, bench.samples)
            sheets[f"search-{name}"] = _sheet(bench, name, condition, asked[:shown])
    return sheets


def _sheet(bench: Bench, name: str, condition: str, asked: np.ndarray) -> Image.Image:
    gallery, render = np.stack(bench.said[name]), modalities.get(condition).render
    grid, titles = [], []
    for number, query in enumerate(asked):
        order = nearest(query, gallery, _FOUND)
        grid.append([render(bench.values(condition)[number]),
                     *(bench.truth.rgb[i] for i in (number, *order))])  # fmt: skip
        ranks = [f"{rank + 1}{', found' * (i == number)}" for rank, i in enumerate(order)]
        titles.append([condition, "its picture", *ranks])
    return contact_sheet(grid, titles)


def nearest(query: np.ndarray, gallery: np.ndarray, count: int) -> Sequence[int]:
    """Rows of the gallery [N, C] in the order of their cosine with a query [C]."""
    lengths = np.linalg.norm(gallery.astype(np.float64), axis=1)
    likeness = gallery.astype(np.float64) @ query / np.maximum(lengths, 1e-9)
    return np.argsort(-likeness, kind="stable")[:count].tolist()
