"""A tiny dataset that holds a label of every modality of the catalogue, without any network."""

from __future__ import annotations

from typing import Any

import numpy as np

from infra.ledger import ShardData
from infra.shards import sample_key, write_tar
from infra.store import Store
from models import modalities
from models.modalities import sam_instance
from pipelines.params import IngestOptions, LabelOptions
from tasks.chain import Chain, remember
from tasks.checks import check
from tasks.fetch import make_plan

LABELERS = (
    "depth", "normal", "semseg", "det", "caption", "clip", "t5_caption", "canny_edge",
    "color_palette", "metadata", "human_poses", "sam", "dinov2", "imagebind",
)  # fmt: skip
ROWS, SHARDS, HEIGHT, WIDTH = 4, 2, 32, 48


def make_labels(root: str, source: str) -> Store:
    """Plans two shards, chooses all labelers and commits made-up labels under their stages."""
    with open(source, "w") as file:
        file.writelines(f"http://a.org/{i}.jpg\tcube {i}\n" for i in range(ROWS * SHARDS))
    store = Store(root)
    make_plan(store, source, shard_rows=ROWS)
    remember(store, "ingest", IngestOptions(source=source).model_dump())
    choices = LabelOptions(labelers=list(LABELERS), device="cpu").model_dump()
    remember(store, "label", choices)
    chain = Chain(store)
    for stage in {chain.fetch, *chain.labels.values()}:
        for shard in range(SHARDS):
            keys = [sample_key(shard, row) for row in range(ROWS)]
            outputs = {name: _members(name, keys, shard) for name in stage.outputs}
            data = ShardData(keys, outputs, [(key, "ok", "") for key in keys], 1.0)
            chain.ledger.commit(stage, shard, data)
    check("label", {**choices, "root": store.url})
    return store


def _members(name: str, keys: list[str], shard: int) -> bytes:
    modality = modalities.get(name)
    return write_tar(
        (f"{key}.{modality.ext}", modality.encode(value_of(name, 10 * shard + row)))
        for row, key in enumerate(keys)
    )


def value_of(name: str, seed: int) -> Any:
    """A value of a modality for a picture of 32 x 48 pixels."""
    rng = np.random.default_rng(seed)
    box = [0.25, 0.25, 0.5, 0.75]
    if name in _SEQUENCES:
        return _SEQUENCES[name](rng, box)
    if name in ("rgb", "semseg", "canny_edge", "sam_edge"):
        top = 4 if name == "semseg" else 256
        shape = (HEIGHT, WIDTH, 3) if name == "rgb" else (HEIGHT, WIDTH)
        return rng.integers(0, top, shape, dtype=np.uint8)
    if name == "depth":
        return rng.uniform(0.1, 1, (HEIGHT, WIDTH)).astype(np.float32)
    if name == "normal":
        found = rng.normal(size=(HEIGHT, WIDTH, 3)).astype(np.float32)
        return found / np.linalg.norm(found, axis=-1, keepdims=True)
    shape = {"t5_caption": (3, 8)}.get(name, (6,) if name.endswith("_global") else (4, 4, 5))
    return rng.normal(size=shape).astype(np.float16)


def _instances(rng: np.random.Generator, box: list[float]) -> dict[str, Any]:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[2:30, 4:44] = True
    half = mask.copy()
    half[:, : 20 + int(rng.integers(8))] = False
    found = [sam_instance.instance(each, 0.9) for each in (mask, half)]
    return {"size": [HEIGHT, WIDTH], "instances": [each for each in found if each]}


_SEQUENCES = {
    "caption": lambda rng, box: f"a cube of {rng.integers(9)} cm",
    "det": lambda rng, box: {"instances": [{"box": box, "class_name": "cube", "score": 0.9}]},
    "metadata": lambda rng, box: {"original_width": 640.0, "brightness": float(rng.integers(255)),
                                  "n_humans": 1.0},
    "color_palette": lambda rng, box: {
        str(n): rng.integers(0, 256, (n, 3)).tolist() for n in range(1, 8)
    },
    "human_poses": lambda rng, box: {
        "humans": [{"box": box, "score": 0.8,
                    "keypoints": [[*rng.uniform(0.25, 0.5, 2), 0.9] for _ in range(17)]}]
    },
    "sam_instance": _instances,
}  # fmt: skip
