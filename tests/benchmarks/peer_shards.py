"""A shard of random samples as the released loader reads them: a tar a modality, texts as text.

Texts have about as many tokens as `data.released_set` has ids: what is behind tokens is written out
as the labels that the released code turns into text, and then into tokens, whenever it reads them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infra.shards import sample_key, write_tar
from models.fourm.catalogue import SIZE
from models.fourm.spec import ModalitySpec
from tests.benchmarks.data import RELEASED_CROPS

_WORDS = "a photo of the small red house on one big green hill with old trees and two boats".split()
_CLASSES = ("airplane", "dog", "person", "zebra")
_COUNTS = ("caption_n_chars", "caption_n_words", "caption_n_sentences", "n_humans",
           "n_sam_instances", "n_coco_instances", "coco_instance_diversity", "semantic_diversity")
_SHARES = ("colorfulness", "brightness", "contrast", "saturation", "entropy", "walkability")
_CORNERS, _INSTANCES, _CODES = 8, 4, 16


def write_shard(root: Path, specs: Sequence[ModalitySpec], rows: int) -> None:
    """Writes `rows` samples of all `specs` as shard 0, with the windows of their crops."""
    rng = np.random.default_rng(0)
    keys = [sample_key(0, row) for row in range(rows)]
    for spec in specs:
        if spec.kind == "img":
            _write(root, spec.name, "npy", keys, lambda spec=spec: _npy(  # type: ignore[misc]
                rng.integers(0, spec.vocab_size, (RELEASED_CROPS, spec.max_tokens), np.int16)))
        else:
            extension, make = _TEXTS[spec.name]
            _write(root, spec.name, extension, keys, lambda make=make: make(rng))  # type: ignore[misc]
    windows = np.tile([0, 0, SIZE, SIZE, 0], (RELEASED_CROPS, 1))
    _write(root, "crop_settings", "npy", keys, lambda: _npy(windows))


def _write(
    root: Path, name: str, extension: str, keys: list[str], make: Callable[[], bytes]
) -> None:
    at = root / name / "shard-00000.tar"
    at.parent.mkdir(parents=True)
    at.write_bytes(write_tar([(f"{key}.{extension}", make()) for key in keys]))


def _npy(array: np.ndarray, pickled: bool = False) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=pickled)
    return sink.getvalue()


def _caption(rng: np.random.Generator) -> bytes:
    text = " ".join(rng.choice(_WORDS, rng.integers(20, 60)))
    return json.dumps([text] * RELEASED_CROPS).encode()


def _boxes(rng: np.random.Generator) -> bytes:
    boxes = []
    for _ in range(rng.integers(4, 12)):
        left, top = rng.uniform(0, 0.5, 2).tolist()
        boxes.append({"boxes": [left, top, left + 0.3, top + 0.3], "score": 0.9,
                      "class_name": str(rng.choice(_CLASSES))})
    return json.dumps({"instances": boxes}).encode()


def _metadata(rng: np.random.Generator) -> bytes:
    facts: dict[str, Any] = {name: int(rng.integers(0, 100)) for name in _COUNTS}
    facts |= {name: float(rng.random()) for name in _SHARES}
    return json.dumps(facts | {"original_width": 640, "original_height": 480}).encode()


def _palette(rng: np.random.Generator) -> bytes:
    palettes = {str(n): rng.integers(0, 256, (n, 3)).tolist() for n in range(1, 8)}
    return json.dumps([palettes]).encode()


def _poses(rng: np.random.Generator) -> bytes:
    people = int(rng.integers(1, 3))
    return json.dumps({
        "bbox_xyxy": [[10.0, 10.0, 100.0, 200.0]] * people,
        "pred_cam": rng.random((people, 3)).tolist(),
        "pose_tokenized": rng.integers(0, 1024, (people, 8)).tolist(),
        "pred_smpl_params": {"global_orient": rng.uniform(-1, 1, (people, 9)).tolist(),
                             "betas": rng.uniform(-1, 1, (people, 10)).tolist()},
    }).encode()


def _instances(rng: np.random.Generator) -> bytes:
    crops = []
    for _ in range(RELEASED_CROPS):
        angle = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
        circle = 40 * np.stack([np.cos(angle), np.sin(angle)], 1)
        centres = rng.integers(40, SIZE - 40, (_INSTANCES, 2))
        crops.append({
            "points": [[(centre + circle).astype(np.int32)] for centre in centres],
            "token_ids": rng.integers(0, 1024, (_INSTANCES, _CODES)).astype(np.int16),
            "bbox": np.concatenate([centres[:, ::-1] - 40, centres[:, ::-1] + 40], 1),
        })
    return _npy(np.array(crops, object), pickled=True)


_TEXTS: dict[str, tuple[str, Callable[[np.random.Generator], bytes]]] = {
    "caption": ("json", _caption), "det": ("json", _boxes), "metadata": ("json", _metadata),
    "color_palette": ("json", _palette), "human_poses": ("json", _poses),
    "sam_instance": ("npy", _instances),
}
