"""Pictures of an evaluation: predictions beside the truth, generations, a box on the move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from infra.ui import contact_sheet
from models import modalities
from models.fourm.generate import Generator
from models.modalities._features import render_alike
from models.modalities.det import draw
from tasks.evaluation.rows import Bench, many, one

MOVES = 5
"""Positions of the moving box."""
_TILE = 128


def overview(bench: Bench, shown: int = 3) -> dict[str, Image.Image]:
    """Every modality at once: a picture with its labels, and below what 4M predicts from it."""
    names = [task.target for task in bench.tasks_from_rgb()
             if task.name in bench.kept.values]  # fmt: skip
    if not names:
        return {}
    kept = {name: bench.kept.values[f"rgb->{name}"] for name in names}
    count = min(shown, len(bench.truth))
    pictures = bench.truth.rgb[:count]
    columns = [
        _column(name, [*kept[name]["teacher"][:count], *kept[name]["fourm"][:count]], pictures * 2)
        for name in names
    ]
    rows = []
    for number, picture in enumerate(pictures):
        rows.append([picture, *(_tile(column[number]) for column in columns)])
        made = [_tile(column[count + number]) for column in columns]
        rows.append([np.full_like(picture, 255), *made])
    sides = ["labels", "4M from RGB"] * count
    return {"overview": contact_sheet(rows, ["rgb", *names], row_titles=sides)}


def _tile(picture: np.ndarray) -> np.ndarray:
    """A picture in the size of an overview's cells."""
    if picture.shape[:2] == (_TILE, _TILE):
        return picture
    return np.asarray(Image.fromarray(picture).resize((_TILE, _TILE), Image.Resampling.LANCZOS))


def prediction_sheets(bench: Bench, shown: int) -> dict[str, Image.Image]:
    """A sheet a task from RGB: picture, truth, teacher, 4M, one row a sample."""
    sheets = {}
    several = f"fourm_{bench.samples}"
    for task in bench.tasks_from_rgb():
        name = task.target
        if name == "caption" or task.name not in bench.kept.values:
            continue
        rows = bench.kept.values[task.name]
        pictures = bench.truth.rgb[:shown]
        sides = [bench.truth.values[name], rows["teacher"], rows["fourm"], rows[several]]
        flat = [value for side in sides for value in side[:shown]]
        cells = _column(name, flat, pictures * len(sides))
        step = len(pictures)
        grid = [[picture, *cells[i::step]] for i, picture in enumerate(pictures)]
        titles = ["RGB", "truth", "teacher", "4M", f"4M, {bench.samples} samples"]
        sheets[f"rgb-to-{name}"] = contact_sheet(grid, titles)
    return sheets


def _column(
    name: str, values: Sequence[Any], pictures: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Values of one modality as pictures that can be compared."""
    if modalities.get(name).kind == "feature":
        return render_alike(values)
    return [picture_of(name, *pair) for pair in zip(values, pictures, strict=True)]


def picture_of(name: str, value: Any, image: np.ndarray) -> np.ndarray:
    """A value as a picture; boxes are drawn over the image."""
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
            {task.condition: asked}, ["rgb"], settings=many(bench.generator), num_samples=variants,
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
        made = generator.generate(
            {"det": asked}, ["rgb"], settings=one(generator), seeds=[seed] * MOVES
        )
        blank = np.full((size, size, 3), 40, np.uint8)
        rows += [[draw(value, blank) for value in asked], made["rgb"].values]
        titles += [f"{name}: asked", f"{name}: 4M"]
    return contact_sheet(rows, row_titles=titles)


def _at(left: float, name: str) -> dict[str, Any]:
    box = [left, 0.38, left + 0.3, 0.72]
    return {"instances": [{"box": box, "class_name": name, "score": 1.0}]}
