"""Labels as training data of tokenizers: read once, cropped once, kept small in memory."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from infra.ledger import Ledger, Stage, read_statuses
from infra.shards import MISSING_EXT, TarIndex
from infra.store import Store
from models import modalities
from models.crops import crop_box

if TYPE_CHECKING:
    from tasks.tokenizer_config import TokenizerRecipe


def read_values(
    ledger: Ledger, stage: Stage, shard: int, name: str, keys: Sequence[str] | None = None
) -> Iterator[tuple[str, Any]]:
    """(key, value) of a committed shard in order; the value of a hole is None.

    Raises:
        FileNotFoundError: if the stage has not committed the shard.
        ValueError: if a label is not in the format of its modality.
    """
    path, _ = ledger.open_output(stage, shard, name)
    index = TarIndex(path)
    for key in index.keys if keys is None else keys:
        hole = index.ext(key) == MISSING_EXT
        yield key, None if hole else read_label(name, key, index.read(key))


def read_label(name: str, key: str, data: bytes) -> Any:
    """The value of a sample's member.

    Raises:
        ValueError: if it is not in the format of the modality, as one of another version.
    """
    try:
        return modalities.get(name).decode(data)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(
            f"the {name} of sample {key} is not in the format that this version reads: {error}"
        ) from error


def original_sizes(ledger: Ledger, stage: Stage, shard: int) -> dict[str, tuple[int, int]]:
    """Width and height in which the pictures of a shard came, by key; empty where the stage that
    stored them does not tell."""
    table = read_statuses(ledger.store, ledger.read_commit(stage, shard))
    if not {"width", "height"} <= set(table.column_names):
        return {}
    rows = zip(*(table[name].to_pylist() for name in ("key", "width", "height")), strict=True)
    return {key: (width, height) for key, width, height in rows if width and height}


def source_of_pictures(stage: Stage) -> Stage | None:
    """The nearest stage upstream, itself included, that wrote rgb."""
    if "rgb" in stage.outputs:
        return stage
    return next((s for s in map(source_of_pictures, stage.upstream) if s is not None), None)


class Aspects:
    """Width / height of the pictures of a shard, which every crop window depends on.

    Maps carry their own shape; boxes and feature grids do not, so the picture's header is read.
    """

    def __init__(self, ledger: Ledger, stage: Stage, shard: int) -> None:
        source = source_of_pictures(stage)
        self._index = TarIndex(ledger.open_output(source, shard, "rgb")[0]) if source else None

    def __call__(self, key: str) -> float:
        """The aspect ratio of a sample; 1 where no picture is known."""
        if self._index is None or key not in self._index:
            return 1.0
        if self._index.ext(key) == MISSING_EXT:
            return 1.0
        with Image.open(io.BytesIO(self._index.read(key)), formats=("JPEG", "PNG")) as image:
            return image.width / image.height


def aspect_of(name: str, value: Any, key: str, aspects: Aspects) -> float:
    """Width / height of the picture that a value belongs to."""
    if modalities.get(name).kind in ("image", "map"):
        return value.shape[1] / value.shape[0]
    return aspects(key)


def load_crops(
    store: Store,
    name: str,
    stage: Stage,
    recipe: TokenizerRecipe,
    shards: Sequence[int],
    *,
    held_out: int,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Training crops, packed [N, H, W(, C)], and held-out ones as values.

    Centre crops of the last shard that has labels are held out; of a single shard the last tenth of
    what it gives. Each sample gives one crop, sample i crop i modulo their number, so that all
    crops occur, the same ones in each run, and memory stays bounded by `recipe.max_samples`.

    Raises:
        ValueError: if there is not a single label.
    """
    from tokenizers_vq.codec import pack_value

    ledger, named = Ledger(store), list(shards)
    # The last shard of a list may be a few rows that all failed.
    while len(shards) > 1 and not _has_labels(ledger, stage, shards[-1], name):
        shards = shards[:-1]
    share = -(-recipe.max_samples // max(1, len(shards) - 1))
    several = len(shards) > 1
    limit = held_out if several else share
    crops = _cropped(ledger, name, stage, recipe, shards[-1], limit, centred=several)
    last = list(crops)
    values: Iterator[np.ndarray] = chain.from_iterable(
        _cropped(ledger, name, stage, recipe, shard, share) for shard in shards[:-1]
    )
    if not several:
        cut = max(1, len(last) * 9 // 10)
        values, last = iter(last[:cut]), last[cut:] or last
    # Packed at once: as floats they would take four times the memory.
    packed = (pack_value(recipe.kind, value) for value in islice(values, recipe.max_samples))
    train = _stacked(packed)
    if not len(train) or not last:
        raise ValueError(f"{stage.id} holds no {name} in shards {named}")
    return train, last[:held_out]


def _has_labels(ledger: Ledger, stage: Stage, shard: int, name: str) -> bool:
    return any(value is not None for _, value in read_values(ledger, stage, shard, name))


def _stacked(values: Iterator[np.ndarray]) -> np.ndarray:
    """Values of one shape as one array. It grows where it lies, as far as the system can let it: a
    list of them and its copy would take the memory twice."""
    rows, count = np.empty(0), 0
    for value in values:
        if not count:
            rows = np.empty((64, *value.shape), value.dtype)
        if value.shape != rows.shape[1:]:
            raise ValueError(f"values of one modality have shapes {rows.shape[1:]}, {value.shape}")
        if count == len(rows):
            rows.resize((count + count // 8, *value.shape), refcheck=False)
        rows[count] = value
        count += 1
    rows.resize((count, *rows.shape[1:]), refcheck=False)
    return rows


def _cropped(
    ledger: Ledger,
    name: str,
    stage: Stage,
    recipe: TokenizerRecipe,
    shard: int,
    limit: int,
    *,
    centred: bool = False,
) -> Iterator[np.ndarray]:
    """Crops of the first `limit` pictures, or so many masks: a picture has hundreds of them."""
    crops = _crops(ledger, name, stage, recipe, shard, limit, centred)
    return islice(crops, limit)


def _crops(
    ledger: Ledger, name: str, stage: Stage, recipe: TokenizerRecipe, shard: int, limit: int,
    centred: bool,
) -> Iterator[np.ndarray]:
    policy, modality = recipe.crops, modalities.get(name)
    aspects = Aspects(ledger, stage, shard)
    parts = modality.text.parts if modality.text else None
    for number, (key, value) in enumerate(read_values(ledger, stage, shard, name)):
        if number >= limit:
            return
        if value is not None and parts is not None:
            yield from parts.of(value)
        elif value is not None:
            index = 0 if centred else number % policy.num_crops
            box = crop_box(policy, key, index, aspect_of(name, value, key, aspects))
            yield modality.crop(value, box, policy.size)
