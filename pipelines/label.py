"""Flow: off-the-shelf networks look at every picture."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from prefect import flow

from infra.automations import version_of
from infra.runner import StageJob
from infra.store import Store
from models.labelers.base import COMPUTED
from pipelines import previews
from pipelines.params import LabelerResources, LabelOptions, LabelParams
from pipelines.stages import hand_on, run_jobs, stage_task
from pipelines.workers import NO_GPU, gpus_each
from tasks import chain
from tasks.checks import check
from tasks.label import in_turns, label_jobs


@stage_task("label")
def label_pictures(params: LabelParams) -> list[dict[str, Any]]:
    """Run every chosen labeler over every ingested shard, one after another on the same workers.

    What looks at other labels comes after them, over the shards that have them all.
    """
    store = Store(params.root)
    dataset = chain.Chain(store)
    dataset.check("label", params.model_dump(include=set(LabelOptions.model_fields)))
    shards = sorted(dataset.ledger.committed(dataset.fetch))
    rows: list[dict[str, Any]] = []
    pictures = previews.Galleries(dataset).update
    share = [group.split("+") for group in params.share]
    jobs = label_jobs(dataset.labelers.values(), dataset.fetch, shards, share)
    computed = [name for name, spec in dataset.labelers.items() if spec.model_id == COMPUTED]
    alike = [pair for turn in in_turns(jobs) for pair in _alike(turn, params, computed)]
    for number, (own, group) in enumerate(alike, start=1):
        done = {stage: dataset.ledger.committed(stage) for job in group
                for stage in job.stage.upstream}
        ready = [
            replace(job, shards=tuple(
                shard for shard in dataset.label_shards(job.stage, job.shards)
                if all(shard in done[stage] for stage in job.stage.upstream)
            ))
            for job in group
        ]  # fmt: skip
        title = "label" if number == 1 else f"label-{number}"
        rows += run_jobs(store, ready, params, title, pictures, own)
    return rows


def _alike(
    jobs: list[StageJob], params: LabelParams, computed: Collection[str]
) -> list[tuple[LabelerResources, list[StageJob]]]:
    """Jobs by what their workers occupy; those that occupy the same run one after another.

    Where networks occupy GPUs, what is `computed` without one occupies none, unless told so.
    """
    every = LabelerResources()
    usual = NO_GPU if gpus_each(params) else every
    groups: list[tuple[LabelerResources, list[StageJob]]] = []
    for job in jobs:
        name = job.stage.name.partition(":")[2]
        own = params.resources.get(name, usual if name in computed else every).model_copy(
            update={"batch_size": None, "compile": False}  # told to the labeler
        )
        same = next((group for known, group in groups if known == own), None)
        if same is None:
            groups.append((own, [job]))
        else:
            same.append(job)
    return groups


@stage_task("label previews")
def show_labels(params: LabelParams) -> None:
    """A contact sheet of the first samples: each picture beside all of its labels."""
    previews.show(chain.Chain(Store(params.root)))


@flow(
    name="label",
    flow_run_name="{params.dataset}",
    description=LabelParams.__doc__,
)
def label_flow(params: LabelParams) -> list[dict[str, Any]]:
    """Label every picture: depth, normals, classes, boxes, captions, features."""
    check("label", params.model_dump())
    choices = params.model_dump(include=set(LabelOptions.model_fields))
    chain.remember(Store(params.root), "label", choices)
    rows = label_pictures(params)
    show_labels(params)
    dataset = chain.Chain(Store(params.root))
    shards = dataset.ledger.committed(dataset.fetch)
    stored = [stage for stage in dataset.labels.values() if stage not in dataset.one_pass]
    version = version_of(dataset.ledger, stored or [dataset.fetch], shards)
    hand_on(dataset.store, "label", version)
    return rows
