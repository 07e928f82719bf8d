"""Synthetic data: pictures in the shape of the demo's, tokens in that of the released models'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from models.fourm.catalogue import SIZE, released_spec
from models.fourm.spec import ModalitySpec
from tasks.specs import tokenizer_key

PICTURE, CROPS = 128, 4
RELEASED_CROPS = 10
FIRST_WORD = 4300
"""First id of ordinary words of released models, behind sentinels, numbers and class names."""
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


def scenes_shards(
    store: Store, shards: int, rows: int, size: int, stage: Stage = FETCH
) -> list[np.ndarray]:
    """Commits shards of rendered scenes as `stage`; returns all pictures as they are read again.

    A few scenes are repeated, and enlarged from 128 px: rendering is not what is measured.
    """
    codec = modalities.get("rgb")
    drawn = [render(sample_scene(seed)).rgb for seed in range(min(rows, DISTINCT))]
    sized = [np.asarray(Image.fromarray(each).resize((size, size), Image.Resampling.BICUBIC))
             for each in drawn]
    stored = [codec.encode(each) for each in sized]
    for shard in range(shards):
        keys = [sample_key(shard, row) for row in range(rows)]
        tar = write_tar((f"{key}.jpg", stored[row % len(stored)]) for row, key in enumerate(keys))
        _commit(store, stage, shard, keys, tar)
    return [codec.decode(stored[row % len(stored)]) for row in range(rows)] * shards


def released_set(store: Store, names: Sequence[str], rows: int) -> Manifest:
    """Publishes random tokens in the shapes of the released models: one shard to train on."""
    rng, stages, tokenizers = np.random.default_rng(0), {}, {}
    keys = [sample_key(0, row) for row in range(rows)]
    for name in names:
        spec = released_spec(name)
        stages[name] = Stage(f"make:{name}", 1, {}, (name,))
        _commit(store, stages[name], 0, keys, _tokens(spec, keys, rng))
        count = 0 if spec.kind == "seq" else spec.max_tokens
        tokenizers[tokenizer_key(name)] = {"vocab_size": spec.vocab_size, "num_tokens": count}
    crops = {"num_crops": RELEASED_CROPS, "min_scale": 0.8, "hflip": False, "size": SIZE}
    return publish(Ledger(store), "bench", stages, range(1), splits={"train": [0]},
                   tokenizers=tokenizers, meta={"crops": crops})


def _commit(store: Store, stage: Stage, shard: int, keys: list[str], data: bytes) -> None:
    statuses = [(key, "ok", "") for key in keys]
    Ledger(store).commit(stage, shard, ShardData(keys, {stage.outputs[0]: data}, statuses, 0.0))


def _tar(keys: list[str], images: list[np.ndarray]) -> bytes:
    encode = modalities.get("rgb").encode
    return write_tar([(f"{key}.jpg", encode(image))
                      for key, image in zip(keys, images, strict=True)])


def _tokens(spec: ModalitySpec, keys: list[str], rng: np.random.Generator) -> bytes:
    text = spec.kind == "seq"
    columns = [f"crop{i}" for i in range(RELEASED_CROPS)]
    column = Column("uint16", None if text else spec.max_tokens)
    writer = BlockWriter(dict.fromkeys(columns, column), {})
    longest = min(60, spec.max_tokens - 1)
    for key in keys:
        sizes = rng.integers(min(20, longest - 1), longest, len(columns)) if text \
            else [spec.max_tokens] * len(columns)
        row = [rng.integers(FIRST_WORD if text else 0, spec.vocab_size, size) for size in sizes]
        writer.add(key, dict(zip(columns, row, strict=True)))
    return writer.finish()
