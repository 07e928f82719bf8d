"""How many workers a stage gets, and what each occupies."""

from __future__ import annotations

from infra.machine import cores
from infra.ray_session import Embedded, Existing
from infra.runner import Resources
from pipelines.params import Compute, LabelerResources, LabelOptions

NO_GPU = LabelerResources(gpus=0)
"""Of work that no GPU is of use to."""


def resources(compute: Compute, own: LabelerResources | None = None) -> Resources:
    """Workers of a stage: as many as asked, else one for each core, or GPU that it may occupy, of
    this machine or of the cluster, which is asked once the run begins.

    Args:
        compute: Where the work of all stages runs.
        own: What one of them gets instead, as far as it says so.
    """
    own = own or LabelerResources()
    each = gpus_each(compute, own)
    workers = compute.workers if own.workers is None or compute.workers == 0 else own.workers
    threads = 0
    if workers == 0 or isinstance(compute.ray, Embedded):
        available = getattr(compute.ray, "num_cpus", None) or cores()
        if workers is None:
            gpus = compute.ray.gpus if isinstance(compute.ray, Embedded) else 0
            workers = max(1, int(gpus / each)) if each else available
        threads = max(1, available // max(1, workers))
    return Resources(
        workers=workers,
        num_cpus=threads if workers else 1,
        num_gpus=each,
        threads=threads,
        accelerator=own.accelerator,
    )


def gpus_each(compute: Compute, own: LabelerResources | None = None) -> float:
    """GPUs that each worker of a stage occupies: as told, else one of this machine's where it has
    any, or what so many workers can have of them.

    A cluster's are given to those who ask for them: it may be shared.
    """
    own = own or LabelerResources()
    if (told := _told(compute, own)) is not None:
        return told
    if compute.workers == 0 or not isinstance(compute.ray, Embedded) or _on_cpu(compute):
        return 0.0
    return min(1.0, compute.ray.gpus / (own.workers or compute.workers or 1))


def unasked(compute: Compute, own: LabelerResources | None = None) -> bool:
    """Whether nobody has said what workers get of a cluster's GPUs, so that they see none."""
    return isinstance(compute.ray, Existing) and compute.workers != 0 and \
        _told(compute, own or LabelerResources()) is None


def _told(compute: Compute, own: LabelerResources) -> float | None:
    return compute.gpus if own.gpus is None else own.gpus


def _on_cpu(compute: Compute) -> bool:
    return isinstance(compute, LabelOptions) and compute.device == "cpu"
