"""Two tokenizers of equal size, trained for equal steps on equal batches of scenes: the released
recipe and ours. Lower errors are better, so a ratio below 1 is ours.

Both have the same tokens a picture, codes, width and blocks. The peer is the released VQ-VAE
(cosine codebook by moving averages, dead codes replaced, its loss of the modality, AdamW) at this
size, with the better of the learning rates that were tried (5e-4, 2e-3); ours is FSQ with the
loss that keeps all codes in use, trained by Muon. Depth is standardised by both, so their maps are
aligned to the truth by scale and shift before they are compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from infra.scenes import EVAL_SEED, MAX_DEPTH, TEACHER_SEED, render, sample_scene
from infra.store import Store
from tasks.tokenizer_config import TokenizerRecipe
from tasks.tokenizer_recipes import tokenizer_recipe
from tasks.tokenizer_task import reconstruction_task
from tasks.trainer import Trainer
from tests.benchmarks.measure import Options, Record, cases
from tokenizers_vq.quantizers import code_statistics
from tokenizers_vq.tokenizer import Tokenizer

SIZE, CODES, STEPS, BATCH, WIDTH = 128, 1000, 200, 32, 256
TRAIN, HELD_OUT = 640, 256
UNITS = {"rgb": "mean squared error of 0..1", "depth": "absolute relative error, aligned"}
_SAME = {"size": SIZE, "width": WIDTH, "batch_size": BATCH, "decoder_depth": 2}
_OURS: dict[str, dict[str, Any]] = {"rgb": {}, "depth": {"depth_mode": "standardise"}}


def ours(name: str, steps: int = STEPS) -> TokenizerRecipe:
    """FSQ: a ViT without codebook, its codes kept in use as by the preset `modern`."""
    spread = tokenizer_recipe(name, "modern").spread
    return tokenizer_recipe(
        name, **_SAME, levels=(8, 5, 5, 5), steps=steps, spread=spread, **_OURS[name]
    )


def released(name: str, steps: int = STEPS) -> TokenizerRecipe:
    """VQ: the released losses, codebook and optimizer around a ViT of the same size."""
    return tokenizer_recipe(
        name, "released", **_SAME, architecture="vit", encoder_depth=1, codes=CODES, steps=steps,
        lr=2e-3, warmup=min(30, steps // 10), ema=0.0, eval_every=0,
    )


def tokenizer_quality(options: Options, steps: int = STEPS) -> list[Record]:
    """Reconstruction error, code usage and perplexity of both on scenes that neither has seen."""
    train, held_out = _scenes(TEACHER_SEED, TRAIN), _scenes(EVAL_SEED, HELD_OUT)
    return cases(
        {f"tokenizer_quality.{name}": partial(_quality, name, train[name], held_out[name], steps,
                                              options) for name in UNITS}, options.only)


def _quality(
    name: str, train: list[np.ndarray], held_out: list[np.ndarray], steps: int, options: Options
) -> Record:
    sides = {}
    for side, recipe in (("ours", ours(name, steps)), ("peer", released(name, steps))):
        tokenizer = _trained(name, recipe, train, options)
        sides[side] = _figures(tokenizer, held_out, train)
    error = {side: figures.pop("error") for side, figures in sides.items()}
    return Record(
        name=f"tokenizer_quality.{name}", unit=UNITS[name], ours=error["ours"],
        peer=error["peer"], dtype=options.dtype, threads=options.threads,
        shape={"size": SIZE, "tokens": (SIZE // 16) ** 2, "codes": CODES, "steps": steps,
               "batch": BATCH, "scenes": TRAIN, "held_out": HELD_OUT},
        also={f"{side}.{key}": round(value, 4) for side, figures in sides.items()
              for key, value in figures.items()},
    )  # fmt: skip


def _scenes(seed: int, count: int) -> dict[str, list[np.ndarray]]:
    drawn = [render(sample_scene(seed + number), SIZE) for number in range(count)]
    return {
        "rgb": [each.rgb for each in drawn],
        "depth": [(each.depth / MAX_DEPTH).astype(np.float32) for each in drawn],
    }


def _trained(
    name: str, recipe: TokenizerRecipe, values: list[np.ndarray], options: Options
) -> Tokenizer:
    from tokenizers_vq.codec import pack_value

    packed = np.stack([pack_value(recipe.kind, value) for value in values])
    with tempfile.TemporaryDirectory(prefix="fourm-bench-") as folder:
        store = Store(folder)
        task = reconstruction_task(store, name, recipe, packed)
        net = Trainer(store, "run", task, recipe.training(options.threads)).fit().model
    return Tokenizer(name, net, task.codec, options.dtype)


def _figures(
    tokenizer: Tokenizer, held_out: Sequence[np.ndarray], train: Sequence[np.ndarray]
) -> dict[str, float]:
    tokens = tokenizer.encode_values(held_out)
    decoded = tokenizer.decode_tokens(tokens)
    measure = _squared if tokenizer.modality == "rgb" else _relative
    pairs = zip(decoded, held_out, strict=True)
    every = np.concatenate([tokens, tokenizer.encode_values(train)]).astype(np.int64)
    parameters = sum(value.numel() for value in tokenizer.net.parameters())
    return {
        "error": round(float(np.mean([measure(ours, true) for ours, true in pairs])), 6),
        **code_statistics(torch.from_numpy(every), tokenizer.vocab_size),
        "parameters": parameters / 1e6,
    }


def _squared(pred: np.ndarray, true: np.ndarray) -> float:
    return float((((pred.astype(np.float32) - true) / 255) ** 2).mean())


def _relative(pred: np.ndarray, true: np.ndarray) -> float:
    """Of a depth map without scale: the affine map of it that fits the truth best is compared."""
    columns = np.stack([pred.ravel(), np.ones(pred.size, np.float32)], 1)
    fit = columns @ np.linalg.lstsq(columns, true.ravel(), rcond=None)[0]
    return float((np.abs(fit - true.ravel()) / true.ravel()).mean())
