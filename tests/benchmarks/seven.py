"""4M-7 at the sizes that were published, with random weights and random samples.

A batch is also written as the dictionaries that the released code takes, so that both see the same
slots, tokens and weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.fourm.batch import Batch
from models.fourm.catalogue import SIZE
from models.fourm.checkpoint import save_released
from models.fourm.draws import Draws
from models.fourm.embeddings import IMAGE_MEAN, IMAGE_STD
from models.fourm.masking import Samples, mask_batch
from models.fourm.model import FourM
from models.fourm.released import released_config, to_released
from models.fourm.spec import EOS_ID, FourMConfig, ModalitySpec
from tasks.recipes import recipe
from tasks.recipes.released import SEVEN
from tasks.specs import released_specs, resolve
from tests.benchmarks.data import FIRST_WORD

SIZES = {
    "tiny": {"dim": 384, "encoder_depth": 6, "decoder_depth": 6, "num_heads": 6},
    "base": {"dim": 768, "encoder_depth": 12, "decoder_depth": 12, "num_heads": 12},
}
PEER_MODELS = {"tiny": "fm_tiny_6e_6d_swiglu_nobias", "base": "fm_base_12e_12d_swiglu_nobias"}


def seven(size: str, *, tied: bool = True) -> FourMConfig:
    """4M-7 of a size; `tied` as in training, not as in released checkpoints."""
    return FourMConfig(modalities=released_specs(SEVEN), tie_embeddings=tied, **SIZES[size])


def random_samples(config: FourMConfig, rows: int, seed: int) -> Samples:
    """Random tokens of every modality, texts of 20 to 60 tokens, random pixels."""
    rng = np.random.default_rng(seed)
    grids, sequences, pixels = {}, {}, {}
    for spec in config.modalities:
        if spec.kind == "img":
            grids[spec.name] = rng.integers(0, spec.vocab_size, (rows, spec.max_tokens))
        elif spec.kind == "pixels":
            shape = rows, spec.max_tokens, spec.dense_width
            pixels[spec.name] = rng.integers(0, 256, shape, np.uint8)
        else:
            sequences[spec.name] = random_texts(rng, spec, rows)
    return Samples(grids=grids, sequences=sequences, pixels=pixels)


def random_texts(
    rng: np.random.Generator, spec: ModalitySpec, rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [rows, L] that end with [EOS], and lengths [rows]."""
    length = rng.integers(20, 60, rows)
    ids = rng.integers(FIRST_WORD, spec.vocab_size, (rows, int(length.max())))
    ids[np.arange(rows), length - 1] = EOS_ID
    return np.where(np.arange(ids.shape[1]) < length[:, None], ids, 0), length


def random_batches(config: FourMConfig, rows: int, count: int) -> list[Batch]:
    """Batches of 128 inputs and 128 targets, masked as 4M-7 B was trained."""
    mixture = resolve(recipe("fourm_b").mixture, config)
    return [mask_batch(config, random_samples(config, rows, i), mixture, Draws(0, i, rows))
            for i in range(count)]


def hand_over(folder: Path, model: FourM, batches: list[Batch]) -> None:
    """Writes weights and batches for the released training."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().contiguous().clone()
               for name, value in to_released(model).items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(released_config(model.config)))
    for number, batch in enumerate(batches):
        save_file(released_batch(batch, model.config), folder / f"batch-{number}.safetensors")


def save_model(folder: Path, size: str) -> FourM:
    """A model with random weights, saved as a released checkpoint."""
    torch.manual_seed(0)
    model = FourM(seven(size, tied=False)).eval()
    save_released(model, folder)
    return model


def released_batch(batch: Batch, config: FourMConfig) -> dict[str, torch.Tensor]:
    """A batch as "modality.key" -> tensor of the released code's dictionaries."""
    targets = np.zeros(batch.dec_mod.numel(), np.int64)
    targets[batch.rows.numpy()] = batch.targets.numpy()
    arrays = {key: getattr(batch, key).numpy()
              for key in ("enc_ids", "enc_mod", "enc_pos", "dec_ids", "dec_mod", "dec_pos")}
    arrays["targets"] = targets.reshape(batch.dec_mod.shape)
    found = {}
    for index, spec in enumerate(config.modalities):
        make = _sequence if spec.kind == "seq" else _grid
        entry = make(spec, arrays["enc_mod"] == index, arrays["dec_mod"] == index, arrays)
        if spec.kind == "pixels":
            entry["tensor"] = _pictures(spec, batch, arrays["enc_mod"] == index)
        found |= {f"{spec.name}.{key}": torch.from_numpy(value) for key, value in entry.items()}
    return found


def _empty(rows: int, length: int, dtype: type) -> dict[str, np.ndarray]:
    return {"tensor": np.zeros((rows, length), dtype),
            "input_mask": np.ones((rows, length), bool),
            "target_mask": np.ones((rows, length), bool),
            "decoder_attention_mask": np.zeros((rows, length), np.int32)}


def _grid(spec: ModalitySpec, seen: np.ndarray, asked: np.ndarray, arrays: dict) -> dict[str, Any]:
    entry = _empty(len(seen), spec.max_tokens, np.int64)
    row, slot = np.nonzero(seen)
    place = arrays["enc_pos"][row, slot]
    entry["tensor"][row, place] = arrays["enc_ids"][row, slot]
    entry["input_mask"][row, place] = False
    row, slot = np.nonzero(asked)
    place = arrays["dec_pos"][row, slot]
    entry["tensor"][row, place] = arrays["targets"][row, slot]
    entry["target_mask"][row, place] = False
    first = entry["target_mask"].argmin(1)
    entry["decoder_attention_mask"][np.arange(len(seen)), first] = asked.sum(1)
    return entry


def _sequence(
    spec: ModalitySpec, seen: np.ndarray, asked: np.ndarray, arrays: dict
) -> dict[str, Any]:
    """Inputs, and behind them the targets, whose last one is fed to nothing."""
    entry = _empty(len(seen), 2 * (spec.max_tokens + 1), np.int32)
    for row in range(len(seen)):
        shown, fed = arrays["enc_ids"][row, seen[row]], arrays["dec_ids"][row, asked[row]]
        last = arrays["targets"][row, asked[row]][-1:]
        whole = np.concatenate([shown, fed, last])
        entry["tensor"][row, : len(whole)] = whole
        entry["input_mask"][row, : len(shown)] = False
        entry["target_mask"][row, len(shown) : len(whole)] = False
        entry["decoder_attention_mask"][row, len(shown) : len(whole)] = 1
    return entry


def _pictures(spec: ModalitySpec, batch: Batch, seen: np.ndarray) -> np.ndarray:
    """Normalised pictures whose visible patches are those of the batch."""
    row, slot = np.nonzero(seen)
    whole = np.zeros((len(seen), spec.max_tokens, spec.dense_width), np.uint8)
    whole[row, batch.enc_pos.numpy()[row, slot]] = batch.dense[spec.name].values.numpy()
    side, patch = spec.grid, spec.patch_size
    grid = whole.reshape(len(whole), side, side, patch, patch, 3).transpose(0, 5, 1, 3, 2, 4)
    pixels = grid.reshape(len(whole), 3, SIZE, SIZE) / 255
    mean, std = (np.array(value).reshape(3, 1, 1) for value in (IMAGE_MEAN, IMAGE_STD))
    return ((pixels - mean) / std).astype(np.float32)

