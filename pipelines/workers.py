"""How many workers a stage gets, and what each occupies."""

from __future__ import annotations

from infra.machine import cores
from infra.ray_session import Embedded
from infra.runner import Resources
from pipelines.params import Compute, LabelerResources

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
    each = compute.gpus if own.gpus is None else own.gpus
    workers = compute.workers if own.workers is None or compute.workers == 0 else own.workers
    threads = 0
    if workers == 0 or isinstance(compute.ray, Embedded):
        available = getattr(compute.ray, "num_cpus", None) or cores()
        if workers is None:
            gpus = getattr(compute.ray, "num_gpus", 0)
            workers = max(1, int(gpus / each)) if each else available
        threads = max(1, available // max(1, workers))
    return Resources(
        workers=workers,
        num_cpus=threads if workers else 1,
        num_gpus=each,
        threads=threads,
        accelerator=own.accelerator,
    )
