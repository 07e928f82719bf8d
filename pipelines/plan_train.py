"""`fourm plan-train`: what a training would take."""

from __future__ import annotations

from collections.abc import Iterator

from infra.store import Store
from pipelines.params import PlanTrainParams
from tasks.dry_run import Machines, plan_lines, plan_training
from tasks.mixture import Bound, bind, open_sets
from tasks.recipes import recipe


def run(params: PlanTrainParams) -> Iterator[str]:
    """Lines of the plan. Raises ValueError for what could not be trained."""
    chosen = recipe(
        params.recipe,
        steps=params.steps,
        batch_size=params.batch_size,
        freeze=params.freeze,
        lora=params.lora,
        ema=params.ema,
    )
    bound: tuple[Bound, ...] = ()
    if params.root:
        sets = open_sets(Store(params.root), chosen, params.data or params.manifest)
        bound = bind(chosen, sets)
    names = Machines.__dataclass_fields__
    machines = Machines(**{name: getattr(params, name) for name in names})
    yield f"recipe {params.recipe}"
    yield from plan_lines(plan_training(chosen, machines, bound))
