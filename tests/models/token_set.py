"""A tiny published token set: random tokens, real JPEGs, texts of varying length, two holes."""

from __future__ import annotations

import numpy as np

from infra.blocks import BlockWriter, Column
from infra.ledger import Ledger, ShardData, Stage
from infra.manifest import Manifest, publish
from infra.shards import sample_key, write_tar
from infra.store import Store
from models import modalities

SHARDS, ROWS, CROPS, VOCAB, TEXT_VOCAB = 3, 10, 2, 16, 220
TOKENIZERS = {
    "depth": {"vocab_size": VOCAB, "num_tokens": 4},
    "rgb": {"vocab_size": VOCAB, "num_tokens": 4},
    "text": {"vocab_size": TEXT_VOCAB, "num_tokens": 0},
}


def make_set(
    root: str, name: str = "set", *, held: tuple[str, ...] = ("rgb", "tok_rgb", "tok_depth",
                                                               "caption"), grid: int = 2,
) -> tuple[Store, Manifest]:
    """Publishes the modalities `held`: shards 0 and 1 to train on, 2 held out. Pictures have
    `grid` x `grid` tokens of 16 px."""
    store, manifest_name = Store(root), name
    ledger, rng = Ledger(store), np.random.default_rng(0)
    stages = {}
    for name in held:
        params = {} if manifest_name == "set" else {"set": manifest_name}
        stage = Stage(name=f"make:{name}", version=1, params=params, outputs=(name,))
        stages[name] = stage
        for shard in range(SHARDS):
            keys = [sample_key(shard, row) for row in range(ROWS)]
            data = _pictures(keys, rng, grid) if name == "rgb" else \
                _tokens(name, keys, rng, grid**2)
            statuses = [(key, "ok", "") for key in keys]
            ledger.commit(stage, shard, ShardData(keys, {name: data}, statuses, 0.1))
    crops = {"num_crops": CROPS, "min_scale": 0.8, "hflip": False, "size": 16 * grid}
    tokenizers = {key: {**entry, "num_tokens": entry["num_tokens"] and grid**2}
                  for key, entry in TOKENIZERS.items()}
    manifest = publish(ledger, manifest_name, stages, range(SHARDS),
                       splits={"train": [0, 1], "val": [2]}, tokenizers=tokenizers,
                       meta={} if held == ("caption",) else {"crops": crops})
    return store, manifest


def _pictures(keys: list[str], rng: np.random.Generator, grid: int) -> bytes:
    encode, side = modalities.get("rgb").encode, 16 * grid
    return write_tar([(f"{key}.jpg", encode(rng.integers(0, 255, (side, side, 3), np.uint8)))
                      for key in keys])


def _tokens(name: str, keys: list[str], rng: np.random.Generator, tokens: int) -> bytes:
    """Row 3 of tok_depth is a hole."""
    length = None if name == "caption" else tokens
    columns = [f"crop{i}" for i in range(CROPS)]
    writer = BlockWriter(dict.fromkeys(columns, Column("uint16", length)), {})
    for row, key in enumerate(keys):
        hole = name == "tok_depth" and row == 3
        writer.add(key, {column: None if hole else _row(name, rng, tokens) for column in columns})
    return writer.finish()


def _row(name: str, rng: np.random.Generator, tokens: int) -> np.ndarray:
    if name == "caption":
        return rng.integers(204, TEXT_VOCAB, rng.integers(3, 9))
    return rng.integers(0, VOCAB, tokens)
