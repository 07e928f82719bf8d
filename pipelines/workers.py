"""How many workers a stage gets, and what each occupies."""

from __future__ import annotations

from infra.machine import cores
from infra.runner import Resources
from pipelines.params import Compute


def resources(compute: Compute) -> Resources:
    """Workers of a stage: as many as asked, else one for each core, or GPU that it may occupy."""
    available = getattr(compute.ray, "num_cpus", None) or cores()
    gpus = getattr(compute.ray, "num_gpus", 0)
    workers = compute.workers
    if workers is None:
        workers = max(1, int(gpus / compute.gpus)) if compute.gpus else available
    threads = max(1, available // max(1, workers))
    return Resources(
        workers=workers, num_cpus=threads if workers else 1, num_gpus=compute.gpus, threads=threads
    )
