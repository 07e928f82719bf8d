"""Sequences of feature vectors (T5 embeddings of captions) as files and as inputs of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from infra.strict import read_npy, read_npz
from models.fourm.spec import ModalitySpec


def read_vectors(data: bytes, ext: str) -> np.ndarray:
    """Vectors [L, C] of a member of a shard: `.npy`, or the published `.npz` with `emb` [L, C]
    and `mask_valid` bool [L], of which valid rows are returned.

    Raises:
        ValueError: another extension, or not a table of numbers. Nothing is unpickled.
    """
    if ext not in ("npy", "npz"):
        raise ValueError(f"feature vectors are stored as npy or npz, not as {ext!r}")
    if ext == "npz":
        return valid_vectors(read_npz(data, ("emb", "mask_valid")))
    return valid_vectors(read_npy(data))


def valid_vectors(value: np.ndarray | Mapping[str, Any]) -> np.ndarray:
    """The table [L, C] of a value: itself, or the valid rows of `emb` by `mask_valid`.

    Raises:
        ValueError: no table of numbers.
    """
    if isinstance(value, Mapping):
        if "emb" not in value:
            raise ValueError(f"feature vectors need 'emb', the value has {sorted(value)}")
        table = np.asarray(value["emb"])
        if "mask_valid" in value:
            valid = np.asarray(value["mask_valid"], bool)
            if valid.shape != table.shape[:1]:
                raise ValueError(f"mask_valid {valid.shape} does not go with emb {table.shape}")
            table = table[valid]
    else:
        table = np.asarray(value)
    if table.ndim != 2 or table.dtype.kind != "f":
        raise ValueError(f"feature vectors must be floats [L, C], got {table.dtype} {table.shape}")
    return table


def pad_vectors(
    spec: ModalitySpec, tables: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Stacks tables [L, C] to float32 [B, longest, C] and lengths [B]; at most the model's number
    of vectors is kept.

    Raises:
        ValueError: vectors of another width than the model's.
    """
    wide = sorted({table.shape[1] for table in tables} - {spec.channels})
    if wide:
        raise ValueError(f"{spec.name}: vectors of {wide[0]} values, the model takes "
                         f"{spec.channels}")
    length = np.array([min(len(table), spec.max_tokens) for table in tables], np.int64)
    padded = np.zeros((len(tables), max(1, int(length.max(initial=0))), spec.channels), np.float32)
    for row, table in enumerate(tables):
        padded[row, : length[row]] = table[: length[row]]
    return padded, length
