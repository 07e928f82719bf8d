"""Synthetic data in the shapes of the demo: pictures of 128 px, grids of 64 tokens, short texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from infra.blocks import BlockWriter, Column
from infra.ledger import Ledger, ShardData, Stage
from infra.manifest import Manifest, publish
from infra.scenes import render, sample_scene
from infra.shards import sample_key, write_tar
from infra.store import Store
from models import modalities

SIZE, TOKENS, CROPS, TEXT_VOCAB, FIRST_WORD = 128, 64, 4, 640, 204
VOCABULARIES = {"rgb": 4375, "depth": 1000, "normal": 1000, "semseg": 1000, "clip": 1000}
DISTINCT = 32
"""Scenes that are rendered for a shard of pictures."""
FETCH = Stage("fetch", 1, {}, ("rgb",))


@contextmanager
def empty_store() -> Iterator[Store]:
    """A store in a folder that is removed afterwards."""
    with TemporaryDirectory(prefix="fourm-bench-") as folder:
        yield Store(folder)


def picture(rng: np.random.Generator) -> np.ndarray:
    """Blocks of colour with some noise, uint8 [128, 128, 3]: compresses about as a scene does."""
    blocks = np.kron(rng.integers(30, 225, (8, 8, 3)), np.ones((16, 16, 1), int))
    return (blocks + rng.integers(-4, 5, blocks.shape)).astype(np.uint8)


def scenes_shard(store: Store, rows: int, size: int, stage: Stage = FETCH) -> list[np.ndarray]:
    """Commits one shard of rendered scenes as `stage` and returns them as they are read again.

    A few scenes are repeated, and enlarged from 128 px: rendering is not what is measured.
    """
    codec = modalities.get("rgb")
    drawn = [render(sample_scene(seed)).rgb for seed in range(min(rows, DISTINCT))]
    sized = [np.asarray(Image.fromarray(each).resize((size, size), Image.Resampling.BICUBIC))
             for each in drawn]
    stored = [codec.encode(each) for each in sized]
    keys = [sample_key(0, row) for row in range(rows)]
    tar = write_tar((f"{key}.jpg", stored[row % len(stored)]) for row, key in enumerate(keys))
    _commit(store, stage, 0, keys, tar)
    return [codec.decode(stored[row % len(stored)]) for row in range(rows)]


def token_set(store: Store, rows: int = 256) -> Manifest:
    """Publishes pictures and random tokens of every modality: one shard to train on, a small one
    that is held out."""
    rng = np.random.default_rng(0)
    names = ("rgb", *(f"tok_{name}" for name in VOCABULARIES), "caption", "det")
    stages = {name: Stage(f"make:{name}", 1, {}, (name,)) for name in names}
    for name, stage in stages.items():
        for shard, count in enumerate((rows, 8)):
            keys = [sample_key(shard, row) for row in range(count)]
            pixels = name == "rgb"
            data = _tar(keys, [picture(rng) for _ in keys]) if pixels else _tokens(name, keys, rng)
            _commit(store, stage, shard, keys, data)
    sizes = {name: {"vocab_size": v, "num_tokens": TOKENS} for name, v in VOCABULARIES.items()}
    sizes["text"] = {"vocab_size": TEXT_VOCAB, "num_tokens": 0}
    crops = {"num_crops": CROPS, "min_scale": 0.8, "hflip": False, "size": SIZE}
    return publish(Ledger(store), "bench", stages, range(2), splits={"train": [0], "val": [1]},
                   tokenizers=sizes, meta={"crops": crops})


def _commit(store: Store, stage: Stage, shard: int, keys: list[str], data: bytes) -> None:
    statuses = [(key, "ok", "") for key in keys]
    Ledger(store).commit(stage, shard, ShardData(keys, {stage.outputs[0]: data}, statuses, 0.0))


def _tar(keys: list[str], images: list[np.ndarray]) -> bytes:
    encode = modalities.get("rgb").encode
    return write_tar([(f"{key}.jpg", encode(image))
                      for key, image in zip(keys, images, strict=True)])


def _tokens(name: str, keys: list[str], rng: np.random.Generator) -> bytes:
    text = name in ("caption", "det")
    columns = [f"crop{i}" for i in range(CROPS)]
    column = Column("uint16", None if text else TOKENS)
    writer = BlockWriter(dict.fromkeys(columns, column), {})
    for key in keys:
        if text:
            row = [rng.integers(FIRST_WORD, TEXT_VOCAB, rng.integers(10, 50)) for _ in columns]
        else:
            vocabulary = VOCABULARIES[name.removeprefix("tok_")]
            row = [rng.integers(0, vocabulary, TOKENS) for _ in columns]
        writer.add(key, dict(zip(columns, row, strict=True)))
    return writer.finish()
