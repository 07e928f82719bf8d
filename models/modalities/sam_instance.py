"""Instances that SAM finds: masks without classes, best first.

    {"size": [height, width],
     "instances": [{"box": [xmin, ymin, xmax, ymax], "score": float, "mask": bool [h, w]}]}

Boxes are half-open whole pixels, a mask covers its box. In the JSON file a mask is `counts`: run
lengths of its rows one after another, the first of zeros (COCO's uncompressed RLE, row by row).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from infra.strict import read_json
from models.crops import CropBox
from models.modalities._boxes import MIN_VISIBLE, is_number
from models.modalities.base import MAX_PIXELS, Modality, crop_image, to_json
from models.modalities.semseg import PALETTE
from tokenizers_vq.sequences.form import Codes, Page, Parts, TextForm
from tokenizers_vq.sequences.instances import CODES, inside, sam_to_string, string_to_sam
from tokenizers_vq.sequences.words import most_codes

Instances = dict[str, Any]
PATCH = 64
"""Side of a mask that is stretched for its tokenizer, pixels."""
MAX_MASKS = 8 * MAX_PIXELS
"""Most pixels of all masks of a picture together: a few bytes can tell of any number."""
WORDS = 290
"""Longest text of a crop, as released: what comes after is not told."""
POINTS = 7
"""Places of a crop at which a text tells the instances."""


def instance(mask: np.ndarray, score: float) -> dict[str, Any] | None:
    """The instance of a mask bool [H, W] of the whole image; None where it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    left, right = int(columns[0]), int(columns[-1]) + 1
    cut = np.ascontiguousarray(mask[top:bottom, left:right])
    return {"box": [left, top, right, bottom], "score": float(score), "mask": cut}


def patch(each: dict[str, Any], side: int = PATCH) -> np.ndarray:
    """The mask of an instance stretched to float32 [side, side] in 0..1, as tokenizers see it."""
    image = Image.fromarray(each["mask"].astype(np.float32))
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), np.float32)


def _encode(value: Instances) -> bytes:
    instances = [
        {"box": each["box"], "score": each["score"], "counts": run_lengths(each["mask"])}
        for each in value["instances"]
    ]
    return to_json({"size": list(value["size"]), "instances": instances})


def run_lengths(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of zeros and ones of a mask, row by row, beginning with zeros."""
    flat = mask.astype(np.int8).ravel()
    bounds = np.flatnonzero(np.diff(flat, prepend=0)) if flat.size else np.array([], int)
    return np.diff(np.concatenate([[0], bounds, [flat.size]])).tolist()


def _decode(data: bytes) -> Instances:
    value = read_json(data)
    if not isinstance(value, dict) or not {"size", "instances"} <= value.keys():
        raise ValueError("an instance file must hold an object with 'size' and 'instances'")
    size, instances = value["size"], value["instances"]
    if not _are_whole(size, 2):
        raise ValueError("the size of a picture must be two whole numbers, height and width")
    if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"instances of a picture of {size[1]} x {size[0]} pixels")
    if not isinstance(instances, list) or not all(map(_is_instance, instances)):
        raise ValueError("an instance must have 'box', 'score' and 'counts', all of numbers")
    if sum(_area(each["box"]) for each in instances) > MAX_MASKS:
        raise ValueError(f"masks of more than {MAX_MASKS} pixels")
    return {"size": size, "instances": [_read(each, *size) for each in instances]}


def _are_whole(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and {type(x) for x in value} == {int}


def _is_instance(each: object) -> bool:
    return (
        isinstance(each, dict) and _are_whole(each.get("box"), 4)
        and is_number(each.get("score")) and isinstance(each.get("counts"), list)
    )  # fmt: skip


def _area(box: list[int]) -> int:
    left, top, right, bottom = box
    return max(right - left, 0) * max(bottom - top, 0)


def _read(each: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    left, top, right, bottom = each["box"]
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(f"box {each['box']} does not lie in a picture of {width} x {height}")
    counts = np.asarray(each["counts"] or [0])
    if counts.ndim != 1 or counts.dtype.kind != "i":
        raise ValueError("run lengths of a mask must be whole numbers")
    # Each of them first, for a sum may overflow.
    area = _area(each["box"])
    if (counts < 0).any() or (counts > area).any() or counts.sum() != area:
        raise ValueError(f"run lengths of a mask do not add up to its box {each['box']}")
    ones = np.arange(len(counts)) % 2 == 1
    mask = np.repeat(ones, counts).reshape(bottom - top, right - left)
    return {"box": [left, top, right, bottom], "score": each["score"], "mask": mask}


def _crop(value: Instances, box: CropBox, size: int) -> Instances:
    """Instances of which a tenth is visible, in pixels of the crop."""
    height, width = value["size"]
    kept = []
    for each in value["instances"]:
        left, top, right, bottom = each["box"]
        full = np.zeros((height, width), np.uint8)
        full[top:bottom, left:right] = each["mask"]
        window = crop_image(Image.fromarray(full), box, size, Image.Resampling.NEAREST)
        found = instance(np.asarray(window) > 0, each["score"])
        # Pixels of the crop have another size than those of the picture.
        scale = box.height * height * box.width * width / size**2
        if found and found["mask"].sum() * scale > MIN_VISIBLE * each["mask"].sum():
            kept.append(found)
    return {"size": [size, size], "instances": kept}


def _render(value: Instances) -> np.ndarray:
    """Masks in colours of their own, the largest first so that none is hidden whole."""
    height, width = value["size"]
    picture = np.full((height, width, 3), 40, np.uint8)
    order = sorted(value["instances"], key=lambda each: -int(each["mask"].sum()))
    for number, each in enumerate(order):
        left, top, right, bottom = each["box"]
        picture[top:bottom, left:right][each["mask"]] = PALETTE[number % 254 + 1]
    return picture


def _scale(value: Instances, page: Page) -> tuple[float, float]:
    """What pixels of a value are multiplied with in its text."""
    height, width = value["size"]
    step = 1.0 if page.size < page.bins else (page.bins - 1) / page.size
    return page.size / width * step, page.size / height * step


def _codes(page: Page) -> Codes:
    if page.codes is None:
        raise ValueError("sam_instance is told in codes of masks: its tokenizer is missing")
    return page.codes


def _write(value: Instances, page: Page) -> str:
    """What lies at places drawn evenly from the crop."""
    height, width = value["size"]
    rng = page.rng
    points = [(int(rng.integers(width)), int(rng.integers(height))) for _ in range(POINTS)]
    seen = [each for each in value["instances"] if any(inside(each, *place) for place in points)]
    told: list[dict[str, Any]] = []
    if seen:
        codes = _codes(page).encode_values([patch(each) for each in seen])
        told = [{**each, "codes": row.tolist()} for each, row in zip(seen, codes, strict=True)]
    line = sam_to_string(told, points, bins=page.bins, scale=_scale(value, page))
    return " ".join(line.split()[:WORDS])


def _told(text: str, page: Page) -> Instances:
    """Every instance of a text once; masks are those that its codes stand for."""
    value: Instances = {"size": [page.size, page.size], "instances": []}
    x_scale, y_scale = _scale(value, page)
    found: dict[tuple[int, ...], list[int]] = {}
    for place in string_to_sam(text, bins=page.bins):
        for each in place["instances"]:
            corners = zip(each["box"], (x_scale, y_scale) * 2, strict=True)
            box = tuple(min(round(x / scale), page.size) for x, scale in corners)
            if box[0] < box[2] and box[1] < box[3]:
                found.setdefault(box, each["codes"])
    if found:
        codes = np.minimum(np.array(list(found.values())), _codes(page).vocab_size - 1)
        masks = _codes(page).decode_tokens(codes)
        value["instances"] = [
            {"box": list(box), "score": 1.0, "mask": _stretched(mask, box)}
            for box, mask in zip(found, masks, strict=True)
        ]
    return value


def _stretched(mask: np.ndarray, box: tuple[int, ...]) -> np.ndarray:
    image = Image.fromarray((mask > 0).astype(np.float32))
    shape = box[2] - box[0], box[3] - box[1]
    return np.asarray(image.resize(shape, Image.Resampling.BILINEAR)) >= 0.5


MODALITY = Modality(
    name="sam_instance",
    kind="sequence",
    ext="json",
    encode=_encode,
    decode=_decode,
    crop=_crop,
    render=_render,
    description="masks with boxes in pixels and scores, best first",
    text=TextForm(
        write=_write,
        read=_told,
        words=("none", "point", "polygon"),
        parts=Parts(
            of=lambda value: [patch(each) for each in value["instances"]],
            show=lambda part: (np.clip(part, 0, 1) * 255).astype(np.uint8)[..., None].repeat(3, 2),
            count=CODES,
            most=most_codes,
        ),
    ),
    tokenizer={"kind": "mask", "size": PATCH, "levels": (4, 4, 4, 4, 4)},
)
