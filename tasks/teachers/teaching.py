"""How any teacher is taught: on batches of scenes, by the one trainer, into the shipped weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from infra.store import Store
from tasks.teachers.data import TeacherScenes
from tasks.trainer import Task, TrainConfig, Trainer

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger("fourm.teachers")

Indices = NDArray[np.int64]

_WARMUP = 0.03  # share of the steps


class Teacher(Task):
    """A network that labels scenes and what it learns from; subclasses say which.

    Args:
        scenes: What to learn from; its held-out part is not touched.
        resume: Folder of weights to go on from, at half the learning rate.
    """

    batch_size = 32
    lr = 1e-3
    clip_norm = 1.0
    steps = 1000
    """Steps that the shipped weights took, about."""

    def __init__(self, scenes: TeacherScenes, resume: Path | None = None) -> None:
        if scenes.training < self.batch_size:
            raise ValueError(
                f"{scenes.training} scenes to train on do not fill a batch of {self.batch_size}"
            )
        self.scenes, self.resume = scenes, resume

    def build(self) -> tuple[nn.Module, list[Any]]:
        """Return the untrained network, and the processors that are saved beside it."""
        raise NotImplementedError

    def learner(self, network: nn.Module) -> nn.Module:
        """Return the network with whatever learns with it and is thrown away."""
        return network

    def examples(self, chosen: Indices, rng: np.random.Generator, mirrored: bool) -> Any:
        """Return the batch of the scenes `chosen` [B]. Teachers mirror whole batches as told, or
        single scenes as `rng` draws."""
        raise NotImplementedError

    def build_model(self) -> nn.Module:
        """The learner, its network fresh or from the weights to go on from."""
        import torch

        self.network, self.processors = self.build()
        if self.resume:
            kind: Any = type(self.network)
            known = kind.from_pretrained(self.resume, dtype=torch.float32)
            self.network.load_state_dict(known.state_dict())
        return self.learner(self.network).to(memory_format=torch.channels_last)

    def batch(self, step: int, rank: int, world: int) -> Any:
        """The batch of a step: every scene once an epoch, every other batch mirrored."""
        seed = int(self.resume is not None)
        epoch, place = divmod(step, self.scenes.training // self.batch_size)
        order = np.random.default_rng([seed, epoch]).permutation(self.scenes.training)
        chosen = np.sort(order[place * self.batch_size :][: self.batch_size])
        return self.examples(chosen, np.random.default_rng([seed, step, 1]), step % 2 == 1)


def teach(teacher: Teacher, folder: Path, run: Path, steps: int, *, threads: int = 0) -> None:
    """Train a teacher and save it, weights in half precision, with its processors.

    Args:
        teacher: What learns, from what.
        folder: Where the network and its processors go.
        run: Checkpoints and loss curve; a run that was cut off goes on from there.
        steps: Optimizer steps.
        threads: CPU threads of torch; 0 leaves torch's choice.
    """
    config = TrainConfig(
        steps=steps,
        batch_size=teacher.batch_size,
        lr=teacher.lr / 2 if teacher.resume else teacher.lr,
        warmup_steps=int(_WARMUP * steps),
        weight_decay=0.02,
        betas=(0.9, 0.98),
        clip_norm=teacher.clip_norm,
        threads=threads,
    )
    Trainer(Store(str(run.parent)), run.name, teacher, config).fit(_log)
    _save_half(teacher.network, folder)
    for processor in teacher.processors:
        processor.save_pretrained(folder)


def _log(step: int, steps: int, metrics: dict[str, float]) -> None:
    logger.info(
        "step %d/%d loss %.3f, %.0f scenes/s",
        step, steps, metrics["loss"], metrics["samples_per_second"],
    )  # fmt: skip


def _save_half(network: Any, folder: Path) -> None:
    """Write a `transformers` model as fp16 safetensors and config.json into a folder."""
    import torch

    network.eval().to(dtype=torch.float16, memory_format=torch.contiguous_format)
    network.save_pretrained(folder)


def images_of(scenes: TeacherScenes, chosen: Indices, mirrored: bool) -> torch.Tensor:
    """Images as float32 [B, 3, S, S] in 0..1."""
    import torch

    rgb = maps_of(scenes.rgb, chosen, mirrored).permute(0, 3, 1, 2)
    return rgb.float().div_(255).contiguous(memory_format=torch.channels_last)


def maps_of(array: NDArray[Any], chosen: Indices, mirrored: bool) -> torch.Tensor:
    """Maps [B, S, S, ...] of the chosen scenes."""
    import torch

    maps = torch.from_numpy(np.array(array[chosen]))
    return maps.flip(2) if mirrored else maps
