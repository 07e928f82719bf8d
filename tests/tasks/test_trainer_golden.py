"""The loss curve of a fixed small training: a refactoring that moves it has changed a number.

fp32 on one CPU rounds differently from machine to machine, by about 1e-5 in a loss after 50 steps;
a changed mask, weight, rate or update moves the curve by far more than `TOLERANCE`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from infra.store import Store
from models.fourm.batch import Batch
from models.fourm.masking import Component, Draws, Mixture, Samples, mask_batch
from models.fourm.model import FourM
from models.fourm.spec import EOS_ID, FourMConfig, ModalitySpec
from tasks.flops import Load, fourm_load
from tasks.task import Task
from tasks.train_config import TrainConfig
from tasks.trainer import Trainer

TOLERANCE = 5e-3
GOLDEN = [3.12951, 2.79129, 2.44788, 2.22829, 2.1807, 2.15074, 2.1717, 2.14923, 2.13511, 2.11983]
"""Mean loss of every five steps."""

SPECS = (
    ModalitySpec(name="rgb@32", kind="pixels", max_tokens=4, patch_size=16, is_target=False),
    ModalitySpec(name="tok_rgb@32", kind="img", max_tokens=4, vocab_size=8),
    ModalitySpec(name="tok_depth@32", kind="img", max_tokens=4, vocab_size=8),
    ModalitySpec(name="caption", kind="seq", max_tokens=8, vocab_size=220),
)
NETWORK = FourMConfig(modalities=SPECS, dim=16, encoder_depth=1, decoder_depth=1, num_heads=2)
EVERYTHING = Mixture(components=(
    Component(inputs={s.name: 1.0 for s in SPECS}, num_inputs=(8, 8), num_targets=(8, 8),
              targets={s.name: 1.0 for s in SPECS if s.is_target}),
))
CONFIG = TrainConfig(steps=50, batch_size=16, lr=1e-2, warmup_steps=5, precision="fp32",
                     log_every=5, checkpoint_seconds=1e6, threads=1)


class Colours(Task):
    """Four codes a sample, from which pixels, depth and caption follow."""

    def build_model(self) -> nn.Module:
        return FourM(NETWORK)

    def batch(self, step: int, rank: int, world: int) -> Batch:
        rows = slice(rank, None, world)
        codes = np.random.default_rng((7, step)).integers(0, 8, (16, 4))[rows]
        words = np.concatenate([204 + codes, np.full((len(codes), 1), EOS_ID)], 1)
        pixels = np.repeat((codes * 30)[..., None], 768, 2).astype(np.uint8)
        samples = Samples(
            grids={"tok_rgb@32": codes, "tok_depth@32": (3 * codes + 1) % 8},
            sequences={"caption": (words, np.full(len(codes), 5))}, pixels={"rgb@32": pixels},
        )
        return mask_batch(NETWORK, samples, EVERYTHING, Draws(0, step, 16, rows))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict]:
        return model(batch).total, {}

    def load(self, batch: Batch) -> Load:
        return fourm_load(NETWORK, batch)


def test_fifty_steps_follow_the_golden_curve(tmp_path):
    found: list[float] = []
    Trainer(Store(str(tmp_path)), "run", Colours(), CONFIG).fit(
        lambda step, steps, metrics: found.append(round(metrics["loss"], 5)))
    assert found == pytest.approx(GOLDEN, abs=TOLERANCE), found


def test_rounded_products_follow_the_golden_curve_more_loosely_and_end_with_the_training(tmp_path):
    found, settings = [], set()

    def point(step: int, steps: int, metrics: dict[str, float]) -> None:
        found.append(metrics["loss"])
        settings.add(torch.get_float32_matmul_precision())

    before = torch.get_float32_matmul_precision()
    config = dataclasses.replace(CONFIG, precision="tf32")
    Trainer(Store(str(tmp_path)), "run", Colours(), config).fit(point)
    assert found == pytest.approx(GOLDEN, abs=10 * TOLERANCE), found
    assert len(settings) == 1
    assert "highest" not in settings
    assert torch.get_float32_matmul_precision() == before


def test_the_load_of_a_batch_counts_what_is_used():
    """Against the formula's terms, summed sample by sample and modality by modality."""
    batch, d, hidden = Colours().batch(0, 0, 1), NETWORK.dim, NETWORK.hidden
    load = fourm_load(NETWORK, batch)
    total = 0
    for inputs, targets in zip(batch.enc_mod.tolist(), batch.dec_mod.tolist(), strict=True):
        n, m = (sum(i >= 0 for i in slots) for slots in (inputs, targets))
        total += n * (8 * d * d + 6 * d * hidden) + 4 * d * n * n + 2 * n * d * d
        total += m * (12 * d * d + 6 * d * hidden) + 4 * n * d * d + 4 * d * m * (m + n)
        for index, spec in enumerate(NETWORK.modalities):
            total += 2 * d * (inputs.count(index) * spec.dense_width
                              + targets.count(index) * spec.vocab_size)
    assert load.flops == total
    assert load.slots == 16 * (8 + 8)
    assert sum(load.tokens.values()) == sum(batch.counts) + int((batch.enc_mod >= 0).sum())
