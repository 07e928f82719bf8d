"""Conditions from files and texts, and results as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models import modalities

if TYPE_CHECKING:
    from models.fourm.generate import Generator

_MAX_BYTES = 64 << 20


def read_input(generator: Generator, name: str, given: str) -> Any:
    """The value of a condition from a file or text, cut to the model's square; a `Part` of a text
    that holds ___ for words that are not known.

    Raises:
        ValueError: the modality does not exist, or the file cannot be read as one of it.
    """
    from tasks.pictures import upright

    spec = generator.spec(name, target=False)
    modality = modalities.get(name)
    if name == "caption":
        return _text(given)
    try:
        data = given.encode() if given.lstrip().startswith(("{", "[")) else _bytes(given)
        value: Any = upright(data) if name == "rgb" else modality.decode(data)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{given!r} cannot be read as {name} ({modality.description}): {error}") \
            from None  # fmt: skip
    if modality.kind not in ("image", "map"):
        return value
    return _square(name, value, _side(spec))


def _text(given: str) -> Any:
    from models.fourm.values import HOLE, Part

    text = given
    if len(given) < 256 and given.endswith(".txt"):
        try:
            text = Path(given).read_text("utf-8").strip()
        except (OSError, ValueError) as error:
            raise ValueError(f"{given!r} cannot be read as caption: {error}") from None
    return Part(text) if HOLE in text else text


def read_part(name: str, value: Any, area: str) -> Any:
    """What an area of a picture or map shows of it.

    Args:
        name: Its modality.
        value: [H, W] or [H, W, C], square.
        area: A box or a mask picture, see `read_area`.

    Raises:
        ValueError: it is no picture, or the area makes no sense.
    """
    from models.fourm.values import Part

    if not isinstance(value, np.ndarray) or value.ndim < 2:
        raise ValueError(f"only a part of a picture or map can be known, not of {name}; in a text "
                         "write ___ for what is not")
    return Part(value, read_area(f"the known part of {name}", area, len(value), len(value)))


def read_area(what: str, area: str, cells: int, side: int) -> np.ndarray:
    """An area of a square picture.

    Args:
        what: Named in errors.
        area: A box "xmin,ymin,xmax,ymax" in 0..1, or a mask picture, white where the area is.
        cells: Cells a side that a box is rounded out to.
        side: Side of the picture in pixels, to which a mask is cut.

    Returns:
        bool [cells, cells] of a box, bool [side, side] of a mask.
    """
    from models.fourm.editing import box_area

    numbers = area.split(",")
    if len(numbers) == 4:
        try:
            return box_area([[float(number) for number in numbers]], cells)
        except ValueError as error:
            raise ValueError(f"{what}, {area!r}: {error}") from None
    try:
        mask = np.asarray(modalities.get("rgb").decode(_bytes(area)))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{what}: {area!r} cannot be read as a mask picture: {error}; a box is "
                         "xmin,ymin,xmax,ymax in 0..1") from None
    return _square("rgb", mask, side)[..., 0] > 127


def redrawn_area(
    generator: Generator, values: Mapping[str, Any], targets: Sequence[str], redraw: str
) -> np.ndarray:
    """What is drawn anew of the input "rgb", bool over its tokens or pixels.

    Raises:
        ValueError: there is no such input, it is not the only target, or the area makes no sense.
    """
    from models.fourm.editing import box_area, changed_boxes

    if not isinstance(values.get("rgb"), np.ndarray) or list(targets) != ["rgb"]:
        raise ValueError("redraw changes a picture: it needs rgb as a whole input and as only "
                         "target")
    grid = generator.spec("rgb", target=True).grid
    if redraw.lstrip().startswith("{") or redraw.endswith(".json"):
        if "det" not in values:
            raise ValueError("redraw by boxes needs the boxes after the edit as the input det")
        before = read_input(generator, "det", redraw)
        return box_area(changed_boxes(before, values["det"]), grid)
    return read_area("redraw", redraw, grid, len(values["rgb"]))


def _bytes(path: str) -> bytes:
    file = Path(path)
    if file.stat().st_size > _MAX_BYTES:
        raise ValueError(f"the file is larger than {_MAX_BYTES >> 20} MiB")
    return file.read_bytes()


def _side(spec: Any) -> int:
    """Side in pixels of the pictures that a modality of the model is made of."""
    if spec.kind == "pixels":
        return spec.grid * spec.patch_size
    return int(spec.name.split("@")[1]) if "@" in spec.name else 224


def _square(name: str, value: np.ndarray, side: int) -> np.ndarray:
    from models.crops import CropPolicy, crop_box

    policy = CropPolicy(num_crops=1, size=side)
    box = crop_box(policy, "", 0, value.shape[1] / value.shape[0])
    return modalities.get(name).crop(value, box, side)


def write_value(
    folder: Path, stem: str, name: str, value: Any, picture: np.ndarray | None
) -> list[Path]:
    """Writes a value for people, and where that loses something the value itself too.

    Args:
        folder: Where to.
        stem: Name of the files without an ending.
        name: Its modality.
        value: What was generated.
        picture: On which boxes are drawn.
    """
    from PIL import Image

    from models.modalities.det import draw

    if isinstance(value, str):
        return [_put(folder / f"{stem}.txt", (value + "\n").encode())]
    if name == "det":
        raw = _put(folder / f"{stem}.json", json.dumps(value, indent=1).encode())
        canvas = picture if picture is not None else np.full((224, 224, 3), 40, np.uint8)
        shown = draw(value, np.ascontiguousarray(canvas))
    else:
        modality = modalities.get(name)
        shown = modality.render(value)
        raw = folder / f"{stem}.value.{modality.ext}"
        if name != "rgb":
            _put(raw, modality.encode(value))
    image = folder / f"{stem}.png"
    Image.fromarray(shown).save(image)
    return [image] if name == "rgb" else [image, raw]


def _put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
