"""The trainer's loop on Ray Train workers with DDP."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import TYPE_CHECKING, Any

from tasks.trainer import Task, TrainConfig, Trainer, TrainResult

if TYPE_CHECKING:
    from infra.store import Store


def fit_distributed(
    store: Store, path: str, task: Task, config: TrainConfig, num_workers: int
) -> TrainResult:
    """Runs `Trainer.fit` on `num_workers` Ray Train workers (one GPU each where there are any).

    The run, its checkpoints and its resume are those of `Trainer`; Ray only restarts workers.
    Needs a Ray session.
    """
    import torch
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    arguments = {"store": store, "path": path, "task": task, "config": config}
    with tempfile.TemporaryDirectory(prefix="fourm-train-") as scratch:
        TorchTrainer(
            _worker,
            train_loop_config=arguments,
            scaling_config=ScalingConfig(
                num_workers=num_workers, use_gpu=torch.cuda.is_available()
            ),
            run_config=RunConfig(
                storage_path=scratch, failure_config=FailureConfig(max_failures=2)
            ),
        ).fit()
    return TrainResult(**store.read_json(f"{path}/result.json"))


def _worker(arguments: dict[str, Any]) -> None:
    import ray.train

    context = ray.train.get_context()
    rank = context.get_world_rank()
    trainer = Trainer(**arguments, rank=rank, world=context.get_world_size())
    result = trainer.fit()
    if rank == 0:
        record = dataclasses.asdict(dataclasses.replace(result, model=None))
        trainer.store.write_json(f"{trainer.path}/result.json", record)
