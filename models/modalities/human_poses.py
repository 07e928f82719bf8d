"""Poses of people: 17 keypoints each in the order of COCO, best person first.

    {"humans": [{"box": [xmin, ymin, xmax, ymax], "score": float, "keypoints": [[x, y, score]]}]}

Coordinates are in 0..1 of the image; keypoints beyond it are guesses of the network.

The released models tell poses by parameters of the SMPL body model instead, which no labeler here
estimates. `RELEASED_TEXT` reads and writes their text, for released checkpoints and token sets:

    Generator(model, tokenizers, text, forms={"human_poses": RELEASED_TEXT})

Its value is `{"people": [{"box", "pose": 8 codes, "global", "camera", "shape"}]}`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from infra.strict import read_json
from models.crops import CropBox
from models.modalities._boxes import is_box, is_number, point, window
from models.modalities.base import Modality, to_json
from tokenizers_vq.sequences.form import Page, TextForm
from tokenizers_vq.sequences.keypoints import keypoints_to_string, string_to_keypoints
from tokenizers_vq.sequences.poses import GROUPS, poses_to_string, string_to_poses
from tokenizers_vq.sequences.words import BINS

KEYPOINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder",
    "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip",
    "left_knee", "right_knee", "left_ankle", "right_ankle",
)  # fmt: skip
_BONES = (
    (0, 1), (0, 2), (1, 3), (2, 4), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10), (5, 11), (6, 12),
    (11, 12), (11, 13), (13, 15), (12, 14), (14, 16),
)  # fmt: skip
_SHOWN = 0.3  # least score of a keypoint in pictures

Poses = dict[str, Any]


def _decode(data: bytes) -> Poses:
    value = read_json(data)
    if not isinstance(value, dict) or not isinstance(value.get("humans"), list):
        raise ValueError("a pose file must hold an object with the list 'humans'")
    for human in value["humans"]:
        if not isinstance(human, dict) or not _are_keypoints(human.get("keypoints")):
            raise ValueError(f"a pose must have {len(KEYPOINTS)} keypoints of x, y and score")
        if not is_box(human.get("box")) or not is_number(human.get("score", 1.0)):
            raise ValueError("a pose must have a box of four numbers, and no score but a number")
    return value


def _are_keypoints(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == len(KEYPOINTS)
        and all(isinstance(p, list) and len(p) == 3 and all(map(is_number, p)) for p in value)
    )


def _crop(value: Poses, box: CropBox, size: int) -> Poses:
    """People of whose box a tenth is visible; in a mirror left and right change places."""
    kept = []
    for human in value["humans"]:
        seen = window(human["box"], box)
        if seen is None:
            continue
        points = [[*point(x, y, box), score] for x, y, score in human["keypoints"]]
        if box.hflip:
            points[1::2], points[2::2] = points[2::2], points[1::2]
        kept.append({**human, "box": seen, "keypoints": points})
    return {**value, "humans": kept}


def _render(value: Poses) -> np.ndarray:
    image = Image.new("RGB", (128, 128), (40, 40, 40))
    pen = ImageDraw.Draw(image)
    for human in value["humans"]:
        places = [(x * 128, y * 128, score) for x, y, score in human["keypoints"]]
        for first, second in _BONES:
            (x0, y0, s0), (x1, y1, s1) = places[first], places[second]
            if min(s0, s1) >= _SHOWN:
                pen.line((x0, y0, x1, y1), fill=(250, 180, 40), width=2)
        for x, y, score in places:
            if score >= _SHOWN:
                pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(90, 220, 250))
    return np.asarray(image)


RELEASED_TEXT = TextForm(
    write=lambda value, page: poses_to_string(value["people"]),
    read=lambda text, page: {"people": string_to_poses(text)},
    words=("human", "none", *GROUPS),
    min_bins=BINS,
)
"""The text of the released models: body-model parameters instead of keypoints."""


def _read(text: str, page: Page) -> Poses:
    return {"humans": string_to_keypoints(text, bins=page.bins)}


MODALITY = Modality(
    name="human_poses",
    kind="sequence",
    ext="json",
    encode=to_json,
    decode=_decode,
    crop=_crop,
    render=_render,
    description="17 COCO keypoints a person, x and y in 0..1 of the image with a score",
    text=TextForm(
        write=lambda value, page: keypoints_to_string(value["humans"], bins=page.bins),
        read=_read,
        words=("human", "none", "pose"),
        grammar="keypoints",
    ),
)
