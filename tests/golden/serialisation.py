"""The case `text_serialisation`: objects to text to ids, and text back to objects.

Ids of ordinary words need the released vocabulary, which is no part of the vectors. It is looked
for beside them and in `FOURM_TEXT_TOKENIZER`. Without it a stand-in holds the layout, whose ids
are fixed, and the few words of the formats, so that all formats are compared in full and the free
texts by the ids of their special tokens, numbers and class names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from tests.golden.registry import Case, Check, family
from tokenizers_vq.sequences import (
    MIN_SCORE,
    det_to_string,
    metadata_to_string,
    palette_to_string,
    poses_to_string,
    sam_to_string,
    string_to_det,
    string_to_metadata,
    string_to_palette,
    string_to_poses,
    string_to_sam,
)
from tokenizers_vq.sequences.metadata import FIELDS, metadata_chunks
from tokenizers_vq.sequences.poses import people_of
from tokenizers_vq.text import FIRST_COORDINATE, TextTokenizer, train_text_tokenizer

FILE = "FOURM_TEXT_TOKENIZER"
_WORDS = {"none": 18109, "human": 6304, "point": 6712, "polygon": 14445, "pose": 8620,
          "global": 9292, "shape": 6631, "camera": 5585}
_COCO = (
    "airplane,apple,backpack,banana,baseball bat,baseball glove,bear,bed,bench,bicycle,bird,boat,"
    "book,bottle,bowl,broccoli,bus,cake,car,carrot,cat,cell phone,chair,clock,couch,cow,cup,"
    "dining table,dog,donut,elephant,fire hydrant,fork,frisbee,giraffe,hair drier,handbag,horse,"
    "hot dog,keyboard,kite,knife,laptop,microwave,motorcycle,mouse,orange,oven,parking meter,"
    "person,pizza,potted plant,refrigerator,remote,sandwich,scissors,sheep,sink,skateboard,skis,"
    "snowboard,spoon,sports ball,stop sign,suitcase,surfboard,teddy bear,tennis racket,tie,"
    "toaster,toilet,toothbrush,traffic light,train,truck,tv,umbrella,vase,wine glass,zebra"
).split(",")
_CLASSES = FIRST_COORDINATE + 4000, FIRST_COORDINATE + 4000 + len(_COCO)


def _same(what: str, got: Any, want: Any) -> Check:
    """1 where two values differ at all."""
    return Check(what, float(got != want), 0.0)


def _tokenizer(case: Case) -> tuple[TextTokenizer, bool]:
    """The released tokenizer if there is one, else the stand-in; and whether it is the former."""
    named = os.environ.get(FILE)
    path = Path(named) if named else case.folder / case.info["tokenizer_file"]
    if not named and not path.exists():
        return _stand_in([sample["text"] for sample in case.info["text"]]), False
    data = path.read_bytes()
    if sha256(data).hexdigest() != case.info["tokenizer_sha256"]:
        raise ValueError(f"{path} is not the tokenizer of the vectors")
    return TextTokenizer.from_bytes(data), True


def _stand_in(texts: list[str]) -> TextTokenizer:
    """Knows all words of the texts; the ids of `_WORDS` are corrected by `_ids`."""
    from tokenizers import AddedToken

    found = train_text_tokenizer([*texts, " ".join(_WORDS)] * 2, class_names=_COCO)
    # Released numbers are words of their own: "xv0=12" and "v0=1000" hold none.
    found.inner.add_special_tokens([
        AddedToken(f"v{axis}={value}", special=True, normalized=False, single_word=True)
        for axis in range(4) for value in range(1000)
    ])
    return found


def _ids(text: TextTokenizer, line: str, released: bool) -> list[int]:
    ids = text.encode(line)
    if released:
        return ids
    moved = {text.inner.token_to_id(word): number for word, number in _WORDS.items()}
    return [moved.get(i, i) for i in ids]


@family("text_serialisation")
def text_serialisation(case: Case) -> list[Check]:
    """All formats of the case."""
    text, released = _tokenizer(case)
    checks = list(_texts(case.info["text"], text, released))
    checks += [_same(name, text.inner.token_to_id(name), i)
               for name, i in case.info["special_token_ids"].items()]
    for name, compare in _FORMATS.items():
        for i, sample in enumerate(case.info[name]):
            lines, back = compare(sample)
            checks += [_same(f"{name}[{i}].{key}", got, want) for key, got, want in lines]
            ids = _ids(text, str(lines[0][1]), released)
            checks.append(_same(f"{name}[{i}].ids", ids, sample["ids"]))
            checks += [_same(f"{name}[{i}] of its ids", back(text.decode(text.encode(
                str(lines[0][1])))), back(str(lines[0][1])))]
    return checks


def _texts(samples: Iterable[dict[str, Any]], text: TextTokenizer, released: bool
           ) -> Iterator[Check]:
    for sample in samples:
        # What `encode` takes for words: it never makes a special token of a text.
        ids = text.inner.encode(sample["text"]).ids
        want, what = sample["ids"], f"text {sample['text']!r}"
        if released:
            yield _same(f"{what} ids", ids, want)
            yield _same(f"{what} decoded", text.decode(ids), sample["decoded"])
        else:
            yield _same(f"{what} ids of the layout", _of_layout(ids), _of_layout(want))


def _of_layout(ids: Iterable[int]) -> list[int]:
    return [i for i in ids if i < _CLASSES[1] and i != 1]


_Lines = list[tuple[str, Any, Any]]


def _window(sample: dict[str, Any]) -> tuple[float, ...]:
    """left, top, width, height of the crop, and width, height of the picture."""
    top, left, height, width = sample["crop_top_left_h_w"]
    return left, top, width, height, *reversed(sample["orig_size_h_w"])


def _cropped(box: Iterable[float], sample: dict[str, Any], scale: tuple[float, float]
             ) -> list[float] | None:
    """A box in the crop, 0..1, or None where nothing of it is left."""
    left, top, width, height, *_ = _window(sample)
    x0, y0, x1, y1 = box
    out = [((x0 * scale[0]) - left) / width, ((y0 * scale[1]) - top) / height,
           ((x1 * scale[0]) - left) / width, ((y1 * scale[1]) - top) / height]
    out = [min(max(x, 0.0), 1.0) for x in out]
    if sample.get("flip"):
        out[0], out[2] = 1 - out[2], 1 - out[0]
    return out if out[2] > out[0] and out[3] > out[1] else None


def _det(sample: dict[str, Any]) -> tuple[_Lines, Any]:
    *_, full_width, full_height = _window(sample)
    instances = []
    for instance in sample["instances"]:
        box = _cropped(instance["boxes"], sample, (full_width, full_height))
        if box is not None:
            instances.append({**instance, "box": box})
    line = det_to_string(instances, min_score=MIN_SCORE)
    back = [[*each["box"], each["class_name"]] for each in string_to_det(line)["instances"]]
    return [("string", line, sample["string"]), ("boxes", back, sample["decoded_boxes"])], (
        string_to_det)


def _metadata(sample: dict[str, Any]) -> tuple[_Lines, Any]:
    line, values = metadata_to_string(sample["metadata"]), sample["decoded_unbinned_fields"]
    found = string_to_metadata(line)
    levels = {name: (FIELDS[name].level(found[name]) if FIELDS[name].bounds else found[name])
              for name in values}
    chunks = metadata_chunks(sample["metadata"])
    return [("string", line, " ".join(sample["chunks_in_given_key_order"])),
            ("chunks", chunks, sample["chunks_in_given_key_order"]),
            ("values", levels, values)], string_to_metadata


def _palette(sample: dict[str, Any]) -> tuple[_Lines, Any]:
    line = palette_to_string(sample["palette"])
    return [("string", line, sample["string"]),
            ("colors", string_to_palette(line), sample["decoded_colors"])], string_to_palette


def _poses(sample: dict[str, Any]) -> tuple[_Lines, Any]:
    people = []
    for person in people_of(sample["persons"]):
        box = _cropped(person["box"], sample, (1, 1))
        if box is not None:
            people.append({**person, "box": box})
    orders = sample.get("group_order")
    line = poses_to_string(people, None if orders is None else orders[: len(people)])
    back = [person["pose"] for person in string_to_poses(line)]
    return [("string", line, sample["string"]),
            ("codes", back, [person["pose"] for person in people])], string_to_poses


def _sam(sample: dict[str, Any]) -> tuple[_Lines, Any]:
    rows = zip(sample["polygons"], sample["codes"], sample["boxes_ymin_xmin_ymax_xmax"],
               strict=True)
    instances = [{"polygon": polygon, "codes": codes, "box": [box[1], box[0], box[3], box[2]]}
                 for polygon, codes, box in rows]
    line = sam_to_string(instances, sample["query_points_xy"])
    found = string_to_sam(line)
    hit = [each for point in found for each in point["instances"]]
    hit.sort(key=lambda each: -(each["box"][2] - each["box"][0]) * (
        each["box"][3] - each["box"][1]))
    boxes = [[box[1], box[0], box[3], box[2]] for box in (each["box"] for each in hit)]
    return [("string", line, sample["string"]),
            ("points", [point["point"] for point in found], sample["query_points_xy"]),
            ("codes", [each["codes"] for each in hit], sample["decoded_codes_largest_box_first"]),
            ("boxes", boxes, sample["decoded_boxes_ymin_xmin_ymax_xmax"])], string_to_sam


_FORMATS = {"det": _det, "metadata": _metadata, "color_palette": _palette,
            "human_poses": _poses, "sam_instance": _sam}
