"""Labelling: which stage each labeler is, over which pictures and other labels.

The workers' side, a shard at a time, is `tasks.label_work`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from infra.ledger import Stage
from infra.overlap import UNITS_AT_ONCE
from infra.units import StageJob
from models import modalities
from models.labelers import LabelerSpec, labeler_class, weights_revision

VERSION = 2


def label_stage(
    spec: LabelerSpec, fetch: Stage, sources: Mapping[str, Stage] | None = None
) -> Stage:
    """Return the stage of a labeler over fetched pictures.

    Batch size, device and compilation are not part of it: they add up the same products in another
    order, which moves a value by its last bits. Precision is: bf16 rounds every operand.

    Args:
        spec: The labeler.
        fetch: A stage that writes `rgb`.
        sources: Modality to the stage that writes it, for labelers that look at other labels.

    Raises:
        ValueError: An output is no modality, a label that the labeler needs is not made, or
            shipped weights do not exist.
    """
    for output in spec.outputs:
        modalities.get(output)
    sources = {**dict.fromkeys(fetch.outputs, fetch), **(sources or {})}
    kind = labeler_class(spec.name)
    if missing := [name for name in kind.reads if name not in sources]:
        raise ValueError(
            f"labeler {spec.name!r} looks at {missing[0]!r}, which nothing writes; "
            f"add its labeler, there are {', '.join(sorted(sources))}"
        )
    seen = [sources[name] for name in (*kind.reads, *kind.also_reads) if name in sources]
    return Stage(
        name=f"label:{spec.name}",
        version=VERSION,
        params={"options": spec.options, "precision": spec.precision},
        outputs=spec.outputs,
        upstream=tuple(dict.fromkeys([fetch, *seen])),
        # A folder may lie anywhere: what it holds is in the revision.
        model=Path(spec.model_id).name if Path(spec.model_id).is_dir() else spec.model_id,
        revision=weights_revision(spec),
    )


def label_stages(specs: Iterable[LabelerSpec], fetch: Stage) -> dict[str, Stage]:
    """Return the stage of each labeler by name; what reads other labels comes after them.

    Raises:
        ValueError: As `label_stage`, or labelers wait for each other.
    """
    sources = dict.fromkeys(fetch.outputs, fetch)
    stages: dict[str, Stage] = {}
    waiting = list(specs)
    while waiting:
        ready = [spec for spec in waiting if not _awaited(spec, waiting)]
        if not ready:
            names = ", ".join(spec.name for spec in waiting)
            raise ValueError(f"labelers {names} wait for the labels of each other")
        for spec in ready:
            stages[spec.name] = label_stage(spec, fetch, sources)
        for spec in ready:
            sources |= dict.fromkeys(spec.outputs, stages[spec.name])
        waiting = [spec for spec in waiting if spec not in ready]
    return stages


def _awaited(spec: LabelerSpec, waiting: list[LabelerSpec]) -> bool:
    kind = labeler_class(spec.name)
    coming = {output for other in waiting if other is not spec for output in other.outputs}
    return not coming.isdisjoint((*kind.reads, *kind.also_reads))


def label_jobs(
    specs: Iterable[LabelerSpec],
    fetch: Stage,
    shards: Iterable[int],
    share: Iterable[Sequence[str]] = (),
) -> list[StageJob]:
    """Return one job for the stage runner for each labeler, over the given shards.

    Args:
        specs: The labelers.
        fetch: A stage that writes `rgb`.
        shards: What to label.
        share: Names of labelers that go over the pictures together, a group each.

    Raises:
        ValueError: As `label_stages`; or a group names what is no labeler, one twice or one
            alone, or one of it looks at the labels of another.
    """
    chosen, by_name = tuple(shards), {spec.name: spec for spec in specs}
    stages = label_stages(by_name.values(), fetch)
    shared = _shared(stages, share)
    return [
        StageJob(
            stage=stage,
            factory="tasks.label_work:build_work",
            config=by_name[name].to_dict(),
            shards=chosen,
            at_once=UNITS_AT_ONCE,
            share=shared.get(name, ""),
        )
        for name, stage in stages.items()
    ]


def _shared(stages: Mapping[str, Stage], share: Iterable[Sequence[str]]) -> dict[str, str]:
    """Labeler to the name of its group."""
    groups: dict[str, str] = {}
    for names in share:
        title = "+".join(names)
        if len(names) == 1:
            raise ValueError(f"share={title!r} is one labeler; join two or more by +: depth+normal")
        for name in names:
            if name not in stages:
                raise ValueError(
                    f"share={title!r}: no labeler {name!r}; there are {', '.join(stages)}"
                )
            if name in groups:
                raise ValueError(f"share={title!r}: {name!r} is in two groups or twice in one")
            groups[name] = title
        depths = {name: _depth(stages[name]) for name in names}
        if later := [name for name in names if depths[name] > min(depths.values())]:
            raise ValueError(
                f"share={title!r}: {later[0]!r} looks at labels that come first; share among "
                "labelers that look at pictures, or among those that look at the same labels"
            )
    return groups


def in_turns(jobs: Iterable[StageJob]) -> list[list[StageJob]]:
    """Jobs in groups, each of which needs only what fetching and the groups before it made."""
    groups: dict[int, list[StageJob]] = {}
    for job in jobs:
        groups.setdefault(_depth(job.stage), []).append(job)
    return [groups[depth] for depth in sorted(groups)]


def _depth(stage: Stage) -> int:
    return 1 + max((_depth(each) for each in stage.upstream), default=0)
