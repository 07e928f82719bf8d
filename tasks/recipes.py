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


# What a target weighs in the demo. Grids whose labels are measured go first; a picture's own codes
# are hard to predict even with the picture in view, and teach little about anything else.
_FROM_PIXELS = {
    "tok_depth": 1.0, "tok_normal": 1.0, "tok_semseg": 1.0, "tok_clip": 0.15, "tok_rgb": 0.1,
    "caption": 4.0, "det": 4.0,
}
_FROM_WORDS = {
    "tok_rgb": 2.0, "tok_depth": 1.0, "tok_normal": 1.0, "tok_semseg": 1.0, "tok_clip": 0.1,
}


def demo(steps: int = 1500) -> TrainRecipe:
    """About 15 minutes on two cores with fast bf16, for scenes of 128 px.

    Two batches of three go from pixels to all labels, the rest is shared by captions to pictures,
    boxes to pictures, and anything to anything.
    """
    return TrainRecipe(
        network={"dim": 256, "encoder_depth": 5, "decoder_depth": 2, "num_heads": 4,
                 "mlp_ratio": 3.0, "tie_embeddings": False, "token_std": 0.5},
        mixture=Mixture(components=(
            Component(weight=6, inputs={"rgb": 1.0}, num_inputs=(64, 64),
                      targets=_FROM_PIXELS, num_targets=(128, 128)),
            Component(weight=1, inputs={"caption": 1.0}, keep="all", num_inputs=(40, 40),
                      targets={**_FROM_WORDS, "det": 4.0}, num_targets=(96, 96)),
            Component(weight=1, inputs={"det": 1.0}, keep="all", num_inputs=(32, 32),
                      targets={**_FROM_WORDS, "caption": 4.0}, num_targets=(96, 96)),
            Component(weight=1, inputs={"*": 0.5}, num_inputs=(80, 80),
                      targets={"*": 0.5}, num_targets=(96, 96)),
        ), per_batch=True),
        training=TrainConfig(steps=steps, batch_size=64, lr=4e-3, warmup_steps=80,
                             min_lr_ratio=0.02),
        max_text=64,
        muon=True,
    )


def demo_long() -> TrainRecipe:
    """The demo's training at five times its length: an hour on the same cores."""
    return demo(steps=6500)


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
