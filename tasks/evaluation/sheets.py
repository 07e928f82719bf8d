"""Pictures of an evaluation: predictions beside the truth, generations, a box on the move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.ui import contact_sheet
from models import modalities
from models.fourm.generate import Generator
from models.modalities.det import draw
from tasks.evaluation.rows import MANY, ONE, Bench

if TYPE_CHECKING:
    from PIL import Image

MOVES = 5
"""Positions of the moving box."""


def prediction_sheets(bench: Bench, shown: int) -> dict[str, Image.Image]:
    """A sheet a task from RGB: picture, truth, teacher, 4M, one row a sample."""
    sheets = {}
    many = f"fourm_{bench.samples}"
    for task in bench.tasks_from_rgb():
        name = task.target
        if name == "caption" or task.name not in bench.kept.values:
            continue
        rows = bench.kept.values[task.name]
        columns = [bench.truth.values[name], rows["teacher"], rows["fourm"], rows[many]]
        grid = []
        for number in range(min(shown, len(bench.truth))):
            picture = bench.truth.rgb[number]
            cells = [_picture(name, column[number], picture) for column in columns]
            grid.append([picture, *cells])
        titles = ["RGB", "truth", "teacher", "4M", f"4M, {bench.samples} samples"]
        sheets[f"rgb-to-{name}"] = contact_sheet(grid, titles)
    return sheets


def _picture(name: str, value: Any, image: np.ndarray) -> np.ndarray:
    if name == "det":
        # Hardly anyone wants to see the boxes that nine of ten samples deny.
        likely = [i for i in value["instances"] if i["score"] >= 0.3]
        return draw({"instances": likely}, np.ascontiguousarray(image))
    return modalities.get(name).render(value)


def caption_rows(bench: Bench, shown: int) -> list[dict[str, str]]:
    """Captions of the first samples: truth, teacher, 4M."""
    rows = bench.kept.values.get("rgb->caption")
    if rows is None:
        return []
    return [
        {"truth": bench.truth.values["caption"][i], "teacher": rows["teacher"][i],
         "4M": rows["fourm"][i], f"4M, {bench.samples} samples": rows[f"fourm_{bench.samples}"][i]}
        for i in range(min(shown, len(bench.truth)))
    ]  # fmt: skip


def generation_sheets(bench: Bench, shown: int, variants: int = 4) -> dict[str, Image.Image]:
    """RGB from captions and from boxes: the real picture beside generated ones."""
    sheets = {}
    for task in bench.tasks_to_rgb():
        asked = bench.truth.values[task.condition][:shown]
        found = bench.generator.generate(
            {task.condition: asked}, ["rgb"], settings=MANY, num_samples=variants,
            seeds=list(range(len(asked))),
        )["rgb"].samples  # fmt: skip
        rows = []
        for number, group in enumerate(found):
            real = bench.truth.rgb[number]
            if task.condition == "det":
                rows.append([_asked(asked[number], real), real,
                             *(_asked(asked[number], image) for image in group)])  # fmt: skip
            else:
                rows.append([real, *group])
        made = [f"4M {i + 1}" for i in range(variants)]
        if task.condition == "det":
            sheets["boxes-to-rgb"] = contact_sheet(rows, ["asked", "real", *made])
        else:
            sheets["caption-to-rgb"] = contact_sheet(rows, ["real", *made])
    return sheets


def _asked(value: dict[str, Any], picture: np.ndarray) -> np.ndarray:
    return draw(value, np.ascontiguousarray(picture))


def moving_box(
    generator: Generator, classes: Sequence[str], size: int, seed: int = 0
) -> Image.Image:
    """One box at several places, and the picture that the model makes of each.

    Args:
        generator: The model; it must take boxes and make RGB.
        classes: Names of which the boxes are, a row each.
        size: Side of the pictures.
        seed: The same for all places, so that what else moves is the model's doing.
    """
    rows, titles = [], []
    for name in classes:
        asked = [_at(0.08 + 0.54 * step / (MOVES - 1), name) for step in range(MOVES)]
        made = generator.generate({"det": asked}, ["rgb"], settings=ONE, seeds=[seed] * MOVES)
        blank = np.full((size, size, 3), 40, np.uint8)
        rows += [[draw(value, blank) for value in asked], made["rgb"].values]
        titles += [f"{name}: asked", f"{name}: 4M"]
    return contact_sheet(rows, row_titles=titles)


def _at(left: float, name: str) -> dict[str, Any]:
    box = [left, 0.38, left + 0.3, 0.72]
    return {"instances": [{"box": box, "class_name": name, "score": 1.0}]}
