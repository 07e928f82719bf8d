"""A chain from any modality to any: each is predicted from all that were made before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from infra.ui import contact_sheet
from tasks.evaluation.rows import Bench, one
from tasks.evaluation.scores import FROM_RGB
from tasks.evaluation.sheets import picture_of

if TYPE_CHECKING:
    from PIL import Image

CHAIN = ("canny_edge", "depth", "normal", "semseg", "det", "caption", "rgb")
"""From an outline drawing over shape, things and words to a picture."""
LEAST = 3
"""A model that knows fewer of them shows no chain."""


def steps(bench: Bench) -> list[str]:
    """The chain as far as the model knows it: what is given first, then what is made."""
    generator = bench.generator
    given = [n for n in CHAIN if n in generator.inputs and n in bench.truth.values][:1]
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
        {start: truth.values[start]}, targets, settings=one(bench.generator),
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


def chain_sheet(bench: Bench, shown: int) -> dict[str, Image.Image]:
    """The chain of the first pictures, a row each, and the real picture at its end."""
    made = bench.kept.values.get("chain")
    if made is None:
        return {}
    names = steps(bench)
    rows: list[list[np.ndarray]] = []
    for number in range(min(shown, len(made[names[1]]))):
        real = bench.truth.rgb[number]
        start = picture_of(names[0], bench.truth.values[names[0]][number], np.zeros_like(real))
        blank = np.full_like(real, 40)
        rows.append([start, *(picture_of(n, made[n][number], blank) for n in names[1:]), real])
    return {"chain": contact_sheet(rows, [f"{names[0]}, given", *names[1:], "real picture"])}
