"""What predictions are held against: the truth of fresh scenes, or a dataset's own labels."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from models import modalities
from models.crops import CropPolicy, crop_box
from models.modalities.semseg import UNLABELLED

if TYPE_CHECKING:
    from infra.scenes import Rendering
    from tasks.chain import Chain

JPEG_QUALITY = 95

Values = dict[str, list[Any]]
"""Modality to one value a picture, as in the catalogue of modalities."""


@dataclass(frozen=True)
class Truth:
    """Pictures and what is true about them.

    Attributes:
        source: "scenes", or "labels" where the labelers' word stands for the truth.
        rgb: uint8 [S, S, 3] each.
        values: One value a picture, of each modality that is known.
        classes: Number of class ids that semseg may have; those that occur count.
        similarity: Share of a caption that is right, from (prediction, truth).
    """

    source: str
    rgb: list[np.ndarray]
    values: Values
    classes: int
    similarity: Callable[[str, str], float]

    def __len__(self) -> int:
        return len(self.rgb)

    def first(self, count: int) -> Truth:
        """The first pictures, at most `count`."""
        values = {name: each[:count] for name, each in self.values.items()}
        return replace(self, rgb=self.rgb[:count], values=values)


def scene_truth(count: int, size: int, first_seed: int | None = None) -> Truth:
    """Scenes of the evaluation's seeds, the pictures as JPEG delivers them.

    Args:
        count: Scenes.
        size: Side of the pictures.
        first_seed: Of the first scene; the first of evaluation by default.
    """
    from infra.scenes import CLASSES, EVAL_SEED, MAX_DEPTH, caption_score, render, sample_scene

    start = EVAL_SEED if first_seed is None else first_seed
    views = [render(sample_scene(start + number), size) for number in range(count)]
    values: Values = {
        "depth": [view.depth / MAX_DEPTH for view in views],
        "normal": [view.normal for view in views],
        "semseg": [view.classes for view in views],
        "det": [_boxes(view) for view in views],
        "caption": [view.caption for view in views],
    }
    rgb = [recompressed(view.rgb) for view in views]
    return Truth("scenes", rgb, values, len(CLASSES), caption_score)


def _boxes(view: Rendering) -> dict[str, Any]:
    pairs = zip(view.boxes.tolist(), view.names, strict=True)
    return {"instances": [{"box": b, "class_name": name, "score": 1.0} for b, name in pairs]}


def recompressed(image: np.ndarray) -> np.ndarray:
    """A picture uint8 [H, W, 3] after the JPEG that every ingested one has gone through."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return np.asarray(Image.open(buffer, formats=("JPEG",)))


def label_truth(chain: Chain, names: Iterable[str], shards: list[int], count: int) -> Truth:
    """Pictures of a dataset with their labels for truth, centre crops.

    Args:
        chain: The dataset.
        names: Modalities to have, as far as the dataset has them.
        shards: Where to take them from; those of the validation split.
        count: Pictures, at most.

    Raises:
        ValueError: the shards hold no picture that has every label.
    """
    from models.fourm.ensemble import word_overlap

    wanted = [name for name in names if name in chain.sources]
    values = read_centred(chain, ["rgb", *wanted], shards, count)
    if not values["rgb"]:
        raise ValueError(f"no picture of shards {shards} has all of {', '.join(wanted)}")
    rgb = values.pop("rgb")
    return Truth("labels", rgb, values, UNLABELLED, word_overlap)


def read_centred(chain: Chain, names: list[str], shards: list[int], count: int) -> Values:
    """Centre crops of the first samples that have all the modalities `names`."""
    from tasks.tokenizer_data import read_values

    policy = CropPolicy(num_crops=1, size=chain.crops.size)
    found: Values = {name: [] for name in names}
    for shard in shards:
        columns = [read_values(chain.ledger, chain.sources[name], shard, name)
                   for name in ("rgb", *(n for n in names if n != "rgb"))]  # fmt: skip
        for row in zip(*columns, strict=True):
            if len(found[names[0]]) >= count:
                return found
            if any(value is None for _, value in row):
                continue
            picture = row[0][1]
            box = crop_box(policy, row[0][0], 0, picture.shape[1] / picture.shape[0])
            order = ("rgb", *(n for n in names if n != "rgb"))
            for name, (_, value) in zip(order, row, strict=True):
                if name in found:
                    found[name].append(modalities.get(name).crop(value, box, policy.size))
    return found
