"""Recipes of 4M trainings: functions that return complete configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from models.fourm.masking import Component, Mixture
from tasks.trainer import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """Everything that decides on a training but the data."""

    network: Mapping[str, Any]
    """Settings of `FourMConfig` other than its modalities."""
    mixture: Mixture
    """Masks by base names of modalities; "*" is every other one."""
    training: TrainConfig
    max_text: int = 256
    """Longest caption or box list in tokens."""
    muon: bool = False
    """Whether Muon updates the matrices of the blocks."""
    val_samples: int = 128
    """Samples of the validation split that losses are measured on."""


def demo(steps: int = 2500) -> TrainRecipe:
    """About 12 minutes on two cores with fast bf16, for scenes of 128 px."""
    return TrainRecipe(
        network={"dim": 256, "encoder_depth": 6, "decoder_depth": 3, "num_heads": 4,
                 "mlp_ratio": 3.0},
        mixture=Mixture(components=(
            Component(weight=5, inputs={"rgb": 1.0}, num_inputs=(64, 64),
                      targets={"*": 1.0, "caption": 4.0, "det": 4.0}, num_targets=(160, 160)),
            Component(weight=1, inputs={"caption": 1.0}, keep="all", num_inputs=(96, 96),
                      targets={"*": 1.0, "caption": 0.0}, num_targets=(128, 128)),
            Component(weight=1, inputs={"det": 1.0}, keep="all", num_inputs=(48, 48),
                      targets={"*": 1.0, "det": 0.0}, num_targets=(128, 128)),
            Component(weight=2, inputs={"*": 0.5}, num_inputs=(96, 96),
                      targets={"*": 0.5}, num_targets=(128, 128)),
        ), per_batch=True),
        training=TrainConfig(steps=steps, batch_size=64, lr=1e-3, warmup_steps=200),
        max_text=128,
        muon=True,
    )


def demo_long() -> TrainRecipe:
    """The demo's training at about five times its length."""
    return demo(steps=12_000)


def fourm_b() -> TrainRecipe:
    """4M-7 B as published: 198 M parameters without embeddings, 500 B tokens, 64 A100 for days."""
    everything = {"*": 0.5}
    return TrainRecipe(
        network={"dim": 768, "encoder_depth": 12, "decoder_depth": 12, "num_heads": 12},
        mixture=Mixture(components=(
            Component(inputs=everything, targets=everything, num_inputs=(128, 128),
                      num_targets=(128, 128)),
            Component(inputs={"rgb": 10.0}, targets=everything, num_inputs=(128, 128),
                      num_targets=(128, 128)),
        )),
        training=TrainConfig(steps=239_000, batch_size=8192, lr=3.2e-3, warmup_steps=4_800,
                             clip_norm=1.0, checkpoint_seconds=1800.0),
    )


RECIPES: dict[str, Callable[[], TrainRecipe]] = {
    "demo": demo, "demo_long": demo_long, "fourm_b": fourm_b,
}


def recipe(
    name: str, *, steps: int | None = None, batch_size: int | None = None, seed: int = 0
) -> TrainRecipe:
    """The recipe of that name with some of its numbers changed. Raises ValueError with the names
    there are."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; choose from {', '.join(RECIPES)}")
    found = RECIPES[name]()
    changed: dict[str, Any] = {"seed": seed}
    if steps is not None:
        changed |= {"steps": steps, "warmup_steps": min(found.training.warmup_steps, steps // 10)}
    if batch_size is not None:
        changed["batch_size"] = batch_size
    return replace(found, training=replace(found.training, **changed))
