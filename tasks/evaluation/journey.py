"""A chain from any modality to any: each is predicted from all that were made before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.ui import contact_sheet
from tasks.evaluation.rows import Bench, one
from tasks.evaluation.scores import FROM_RGB
from tasks.evaluation.sheets import picture_of

if TYPE_CHECKING:
    from PIL import Image

    from tasks.evaluation.truth import Truth

CHAIN = ("rgb", "depth", "normal", "semseg", "canny_edge", "det", "caption", "dinov2_global")
"""From a picture over shape, things and words to what a search takes."""
LEAST = 3
"""A model that knows fewer of them shows no chain."""


def steps(bench: Bench) -> list[str]:
    """The chain as far as the model knows it: what is given first, then what is made."""
    generator = bench.generator
    known = {"rgb", *bench.truth.values}
    given = [n for n in CHAIN if n in generator.inputs and n in known][:1]
    made = [n for n in CHAIN if n in generator.targets and n not in given]
    found = [*given, *made]
    return found if given and len(found) >= LEAST else []


def journey(bench: Bench, count: int) -> dict[str, Any]:
    """Walk the chain for the first pictures of the truth.

    Returns:
        "steps", the modalities in order, and "scores": what each reaches against the truth in the
        metric of its own task, {modality: {metric: value}}; empty where there is no chain.
    """
    names = steps(bench)
    if not names:
        return {}
    truth = bench.truth.first(count)
    start, targets = names[0], names[1:]
    made = bench.generator.generate(
        {start: _values(truth, start)}, targets, settings=one(bench.generator),
        seeds=[bench.seed + i for i in range(len(truth))],
    )  # fmt: skip
    for name in targets:
        bench.kept.keep("chain", name, made[name].values)
    tasks = {task.target: task for task in FROM_RGB}
    scores = {}
    for name in (n for n in targets if n in tasks and n in truth.values):
        found = tasks[name].score(made[name].values, truth)
        scores[name] = {metric: round(value, 5) for metric, value in found.items()}
    return {"steps": names, "pictures": len(truth), "scores": scores}


def _values(truth: Truth, name: str) -> Sequence[Any]:
    return truth.rgb if name == "rgb" else truth.values[name]


def chain_sheet(bench: Bench, shown: int) -> dict[str, Image.Image]:
    """The chain of the first pictures, a row each; it ends with the picture if that was not
    given."""
    made = bench.kept.values.get("chain")
    if made is None:
        return {}
    names = steps(bench)
    rows: list[list[np.ndarray]] = []
    end = [] if names[0] == "rgb" else ["real picture"]
    for number in range(min(shown, len(made[names[1]]))):
        real = bench.truth.rgb[number]
        given = _values(bench.truth, names[0])[number]
        start = picture_of(names[0], given, np.zeros_like(real))
        seen = real if names[0] == "rgb" else np.full_like(real, 40)
        rows.append([start, *(picture_of(n, made[n][number], seen) for n in names[1:])])
        rows[-1] += [real] * len(end)
    return {"chain": contact_sheet(rows, [f"{names[0]}, given", *names[1:], *end])}
