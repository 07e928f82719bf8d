"""`fourm plan-tokenizers`: what training tokenizers would take."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.params import PlanTokenizersParams
from tasks.choices import chosen_recipe
from tasks.tokenizer_plan import plan_lines, plan_tokenizer
from tasks.tokenizer_recipes import PRESETS


def run(params: PlanTokenizersParams) -> Iterator[str]:
    """A line for each recipe.

    Raises:
        ValueError: there is no such recipe or field, or its network cannot be built.
    """
    if params.modalities:
        recipes = {name: chosen_recipe(name, params.model_dump()) for name in params.modalities}
    else:
        recipes = PRESETS[params.preset]
    plans = {name: plan_tokenizer(name, recipe) for name, recipe in recipes.items()}
    yield from plan_lines(plans, params.devices, params.peak_tflops, params.mfu)
