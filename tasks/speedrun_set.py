"""The token set of the speedrun: scenes, and tokens that nothing has to be trained for.

Every token of a grid is a rounded statistic of its 16 x 16 pixels, and the text tokenizer learns
its pieces from the language of scenes itself, so the set is a pure function of the code below and
takes a minute to make. Shards are committed one by one: a killed run goes on where it was.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Callable

import numpy as np

from infra.blocks import BlockWriter, Column
from infra.ledger import Ledger, ShardData
from infra.manifest import Manifest, publish
from infra.scenes import (
    CLASSES,
    COLORS,
    DEMO_SEED,
    MATERIALS,
    SHAPES,
    SIZES,
    Rendering,
    render,
    sample_scene,
)
from infra.shards import sample_key, write_tar
from infra.stages import Stage
from infra.store import Store
from models import modalities
from tokenizers_vq.sequences import det_to_string
from tokenizers_vq.text import TextTokenizer, train_text_tokenizer

logger = logging.getLogger("fourm.speedrun")

NAME = "speedrun"
VERSION = 1
"""Raised when the tokens change; old results then count for another board."""
SIDE, PATCH = 128, 16
GRID = SIDE // PATCH
BINS, TEXT_VOCAB = 64, 1000
SHARD_ROWS = 512
DEPTH_STEP, DEPTH_CODES = 0.25, 80
"""Metres of one code of depth, and their number."""
NORMAL_LEVELS, COLOUR_LEVELS, QUARTERS = 5, 16, 4
CODES: dict[str, int] = {
    "depth": DEPTH_CODES, "normal": NORMAL_LEVELS**3, "rgb": COLOUR_LEVELS**3,
    "semseg": len(CLASSES) ** QUARTERS,
}


def cells(values: np.ndarray, side: int) -> np.ndarray:
    """Pixels [S,S,C] as [S/side * S/side, side * side, C], cells row by row."""
    rows, _, channels = values.shape
    grid = rows // side
    parts = values.reshape(grid, side, grid, side, channels).transpose(0, 2, 1, 3, 4)
    return parts.reshape(grid * grid, side * side, channels)


def depth_tokens(depth: np.ndarray) -> np.ndarray:
    """Mean depth of each patch of [S,S] metres in steps of 25 cm."""
    mean = cells(depth[..., None], PATCH).mean((1, 2))
    return np.minimum(mean / DEPTH_STEP, DEPTH_CODES - 1).astype(np.int64)


def normal_tokens(normal: np.ndarray) -> np.ndarray:
    """Mean normal of each patch of [S,S,3], five levels an axis."""
    levels = np.rint((cells(normal, PATCH).mean(1) * 0.5 + 0.5) * (NORMAL_LEVELS - 1))
    return _number(levels.astype(np.int64), NORMAL_LEVELS)


def rgb_tokens(rgb: np.ndarray) -> np.ndarray:
    """Mean colour of each patch of uint8 [S,S,3], sixteen levels a channel."""
    levels = cells(rgb, PATCH).mean(1) * COLOUR_LEVELS // 256
    return _number(levels.astype(np.int64), COLOUR_LEVELS)


def semseg_tokens(classes: np.ndarray) -> np.ndarray:
    """Most frequent class of each quarter of each patch of [S,S]."""
    half = PATCH // 2
    counts = (cells(classes[..., None], half) == np.arange(len(CLASSES))).sum(1)
    quarters = counts.argmax(-1).reshape(2 * GRID, 2 * GRID, 1)
    return _number(cells(quarters, 2)[..., 0], len(CLASSES))


def _number(digits: np.ndarray, base: int) -> np.ndarray:
    """Rows of digits [N, k] as numbers."""
    return digits @ base ** np.arange(digits.shape[1])[::-1]


GRIDS: dict[str, Callable[[Rendering], np.ndarray]] = {
    "depth": lambda scene: depth_tokens(scene.depth),
    "normal": lambda scene: normal_tokens(scene.normal),
    "rgb": lambda scene: rgb_tokens(scene.rgb),
    "semseg": lambda scene: semseg_tokens(scene.classes),
}


def text_tokenizer() -> TextTokenizer:
    """WordPiece over everything the language of scenes can say."""
    relations = ("left of", "behind", "in front of")
    corpus = [
        f"a {size} {color} {material} {shape} {relation} an empty room"
        for (size, color, material, shape), relation in zip(
            itertools.product(SIZES, COLORS, MATERIALS, SHAPES), itertools.cycle(relations),
            strict=False,
        )
    ]
    return train_text_tokenizer(corpus, class_names=SHAPES, bins=BINS, vocab_size=TEXT_VOCAB)


def make_set(store: Store, *, scenes: int, val_share: float = 1 / 16) -> Manifest:
    """Renders, tokenizes and publishes scenes; what is done already is not done again.

    Args:
        store: Where to.
        scenes: How many, the held-out ones included.
        val_share: Share of shards that is held out, at least one.
    """
    text, ledger = text_tokenizer(), Ledger(store)
    outputs = ("caption", "det", "rgb", *(f"tok_{name}" for name in GRIDS))
    params = {"scenes": scenes, "size": SIDE, "rows": SHARD_ROWS}
    stage = Stage(name=NAME, version=VERSION, params=params, outputs=outputs)
    count = -(-scenes // SHARD_ROWS)
    if count < 2:
        raise ValueError(f"a set needs more than {SHARD_ROWS} scenes, got {scenes}")
    for shard in ledger.todo(stage, range(count)):
        rows = range(shard * SHARD_ROWS, min(scenes, (shard + 1) * SHARD_ROWS))
        ledger.commit(stage, shard, _shard(shard, rows, text))
        logger.info("scenes: %d of %d", rows.stop, scenes)
    held_out = max(1, round(count * val_share))
    tokenizers = {name: {"vocab_size": size, "num_tokens": GRID**2, "fingerprint": f"v{VERSION}"}
                  for name, size in CODES.items()}
    tokenizers["text"] = {"vocab_size": text.vocab_size, "num_tokens": 0,
                          "fingerprint": hashlib.sha256(text.to_bytes()).hexdigest()}
    crops = {"num_crops": 1, "min_scale": 1.0, "hflip": False, "size": SIDE}
    return publish(
        ledger, NAME, dict.fromkeys(outputs, stage), range(count),
        splits={"train": range(count - held_out), "val": range(count - held_out, count)},
        tokenizers=tokenizers, meta={"crops": crops},
    )


def _shard(shard: int, rows: range, text: TextTokenizer) -> ShardData:
    began, keys = time.monotonic(), []
    pictures: list[tuple[str, bytes]] = []
    grids = {name: BlockWriter({"crop0": Column("uint16", GRID**2)}, {}) for name in GRIDS}
    texts = {name: BlockWriter({"crop0": Column("uint16")}, {}) for name in ("caption", "det")}
    encode = modalities.get("rgb").encode
    for number, row in enumerate(rows):
        scene, key = render(sample_scene(DEMO_SEED + row), SIDE), sample_key(shard, number)
        keys.append(key)
        pictures.append((f"{key}.jpg", encode(scene.rgb)))
        for name, tokens in GRIDS.items():
            grids[name].add(key, {"crop0": tokens(scene).astype(np.uint16)})
        boxes = [{"box": [float(x) for x in box], "class_name": name, "score": 1.0}
                 for box, name in zip(scene.boxes, scene.names, strict=True)]
        said = {"caption": scene.caption, "det": det_to_string(boxes, bins=BINS)}
        for name, sentence in said.items():
            texts[name].add(key, {"crop0": np.array(text.encode(sentence), np.uint16)})
    outputs = {"rgb": write_tar(pictures), **{n: w.finish() for n, w in texts.items()},
               **{f"tok_{name}": writer.finish() for name, writer in grids.items()}}
    return ShardData(keys, outputs, [(key, "ok", "") for key in keys], time.monotonic() - began)


def set_digest(manifest: Manifest) -> str:
    """Twelve digits that two sets share only if every byte is the same."""
    parts = [manifest.sha256(name, shard) for shard in manifest.shards()
             for name in sorted(manifest.modalities)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]
