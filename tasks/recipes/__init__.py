"""Recipes of 4M trainings: functions that return complete configurations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tasks.recipes import released
from tasks.recipes.base import MAIN, Lora, Phase, Source, TrainRecipe, described
from tasks.recipes.demo import demo, demo_12, speedrun, whatever_there_is

__all__ = [
    "MAIN", "RECIPES", "Lora", "Phase", "Source", "TrainRecipe", "described", "recipe",
]

RECIPES: dict[str, Callable[[], TrainRecipe]] = {
    "demo": demo, "demo_12": demo_12, "any": whatever_there_is, "speedrun": speedrun,
    "fourm_b": released.fourm_b, "fourm_l": released.fourm_l, "fourm_xl": released.fourm_xl,
    "fourm_21_b": released.fourm_21_b, "fourm_21_l": released.fourm_21_l,
    "fourm_21_xl": released.fourm_21_xl,
    "t2i_b": released.t2i_b, "t2i_l": released.t2i_l, "t2i_xl": released.t2i_xl,
    "sr_l": released.sr_l,
}


def recipe(
    name: str, *, steps: int | None = None, batch_size: int | None = None, seed: int = 0,
    start: str = "", freeze: Sequence[str] = (), lora: int = 0, ema: float = 0.0,
) -> TrainRecipe:
    """The recipe of that name with some of its settings changed.

    Args:
        name: A key of `RECIPES`.
        steps: Optimizer steps; the warm-up shrinks with them.
        batch_size: Samples a step.
        seed: Of weights and batches.
        start: Checkpoint to begin with, see `TrainRecipe.start`.
        freeze: Patterns of tensors that stay, see `TrainRecipe.freeze`.
        lora: Rank of low-rank updates; 0: the recipe's, or none.
        ema: Decay of the mean of the weights that the finished model takes; 0: the recipe's.

    Raises:
        ValueError: there is no such recipe; lists the names.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; choose from {', '.join(RECIPES)}")
    found = RECIPES[name]()
    changed: dict[str, Any] = {"seed": seed}
    if steps is not None:
        changed |= {"steps": steps, "warmup_steps": min(found.training.warmup_steps, steps // 10)}
    if batch_size is not None:
        changed["batch_size"] = batch_size
    if ema:
        changed |= {"ema_decay": ema, "finish_with_ema": True}
    return replace(
        found, training=replace(found.training, **changed), start=start or found.start,
        freeze=tuple(freeze) or found.freeze,
        lora=Lora(rank=lora, alpha=2 * lora) if lora else found.lora,
    )
