"""The trainer's loop on Ray Train workers with DDP or FSDP2.

Ray starts the workers, starts them anew when one is lost, and tells them when their node is about
to be taken away; checkpoints and resume are those of `Trainer`. SIGTERM of the process that
waits for them reaches the workers as an object `<run>/stop` in the store, which they look for at
the points of the loss curve: they keep a checkpoint and end.
"""

from __future__ import annotations

import contextvars
import dataclasses
import logging
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tasks.preemption import Stopped, StopSignal
from tasks.run_store import Checkpoints, TakenOver, read_curve
from tasks.trainer import ProgressCallback, Task, TrainConfig, Trainer, TrainResult

if TYPE_CHECKING:
    from ray.train import ScalingConfig

    from infra.store import Store

log = logging.getLogger("fourm.train")

STOP, RESULT = "stop", "result.json"
FOLLOW_SECONDS = 5.0
"""Seconds between two looks at the curve that a run on workers writes."""
SIGNAL_SECONDS = 0.5
"""Seconds until a noted SIGTERM is told to the workers."""


def fit_distributed(
    store: Store, path: str, task: Task, config: TrainConfig, num_workers: int,
    on_progress: ProgressCallback | None = None, *, on_gpus: bool = False,
) -> TrainResult:
    """Runs `Trainer.fit` on `num_workers` Ray Train workers: one GPU each where there are any or
    they are asked for, since a cluster may have to grow for them; else an equal share of the
    cores, which on a CPU beats as many threads in one process.

    The run, its checkpoints and its resume are those of `Trainer`; Ray only restarts workers.
    Needs a Ray session.

    Raises:
        Stopped: SIGTERM came; the workers have kept a checkpoint.
        TakenOver: somebody else has begun to train the same run.
        ValueError: the batch does not divide into parts of the workers.
    """
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchTrainer

    config.check_workers(num_workers)
    checkpoints = Checkpoints(store, path)
    arguments = {"store": store, "path": path, "task": task, "config": config,
                 "owner": checkpoints.claim()}  # fmt: skip
    for name in (STOP, RESULT):
        store.delete(f"{path}/{name}")
    with (
        tempfile.TemporaryDirectory(prefix="fourm-train-") as scratch,
        _followed(store, path, config.steps, on_progress),
        StopSignal() as signal,
        _told(store, path, signal),
    ):
        TorchTrainer(
            _worker,
            train_loop_config=arguments,
            scaling_config=_scaling(num_workers, on_gpus),
            run_config=RunConfig(
                storage_path=scratch, failure_config=FailureConfig(max_failures=2)
            ),
        ).fit()
    checkpoints.check_owner()
    if signal.requested or not store.exists(f"{path}/{RESULT}"):
        signal.hand_on()
        raise Stopped(f"{path}: the workers have kept a checkpoint; the same call goes on from it")
    return TrainResult(**store.read_json(f"{path}/{RESULT}"))


def _scaling(num_workers: int, on_gpus: bool = False) -> ScalingConfig:
    """What each worker gets. Where there are GPUs is the cluster's to say: the machine that waits
    for the workers often has none."""
    import ray
    from ray.train import ScalingConfig

    there = ray.cluster_resources()
    kind = "GPU" if on_gpus or there.get("GPU", 0) else "CPU"
    if there.get(kind, 0) < num_workers:
        log.warning("%d workers take a %s each, and the cluster has %g as yet: the training waits "
                    "until it has grown", num_workers, kind, there.get(kind, 0))
    if kind == "GPU":
        return ScalingConfig(num_workers=num_workers, use_gpu=True)
    share = max(1, int(there.get("CPU", 1)) // num_workers)
    return ScalingConfig(num_workers=num_workers, resources_per_worker={"CPU": share})


def _worker(arguments: dict[str, Any]) -> None:
    import ray.train

    store, path = arguments["store"], arguments["path"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    # Ray tells of a node that is about to be taken away from 2.60 on.
    preempted = getattr(ray.train, "get_preemption_info", lambda: None)
    leaving = False

    def asked() -> tuple[bool, bool]:
        nonlocal leaving
        before, leaving = leaving, leaving or preempted() is not None
        return leaving and not before, store.exists(f"{path}/{STOP}")

    trainer = Trainer(**arguments, rank=rank, world=context.get_world_size(), asked=asked)
    try:
        result = trainer.fit()
    except (Stopped, TakenOver):  # Ray would begin again
        return
    if rank == 0:
        record = dataclasses.asdict(dataclasses.replace(result, model=None))
        store.write_json(f"{path}/{RESULT}", record)


@contextmanager
def _told(store: Store, path: str, signal: StopSignal) -> Iterator[None]:
    """Tells the workers in the store when SIGTERM has been noted here."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(SIGNAL_SECONDS):
            if signal.requested:
                store.write(f"{path}/{STOP}", b"")
                return

    thread = threading.Thread(target=watch, daemon=True, name="stop signal")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def _followed(
    store: Store, path: str, steps: int, on_progress: ProgressCallback | None
) -> Iterator[None]:
    """Reports the points that the workers add to the curve of the run meanwhile."""
    if on_progress is None:
        yield
        return
    seen = max((line["step"] for line in read_curve(store, path)), default=0)
    stop = threading.Event()

    def report() -> None:
        nonlocal seen
        for line in read_curve(store, path):
            if line["step"] > seen:
                seen = line.pop("step")
                on_progress(seen, steps, line)

    def follow() -> None:
        while not stop.wait(FOLLOW_SECONDS):
            report()

    # The callback draws into the run it is called in, which a bare thread would not know.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(follow,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    report()
