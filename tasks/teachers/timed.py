"""Training for a given time: the learning rate follows the clock, so any machine ends annealed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.optim import build_optimizers, learning_rate_scale

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger("fourm.teachers")

_TICKS = 1000
_WARMUP = 0.03  # share of the time
_LOG_EVERY = 100


def shuffled(count: int, batch_size: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield batches of indices below `count`, int64 [batch_size], epoch after epoch.

    Raises:
        ValueError: There are fewer scenes than a batch holds.
    """
    if count < batch_size:
        raise ValueError(f"{count} scenes to train on do not fill a batch of {batch_size}")
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count)
        for start in range(0, count - batch_size + 1, batch_size):
            yield np.sort(order[start : start + batch_size])


def train_for(
    name: str,
    minutes: float,
    module: nn.Module,
    loss_of: Callable[[Any], torch.Tensor],
    batches: Iterator[Any],
    *,
    lr: float,
    weight_decay: float = 0.02,
    clip: float = 1.0,
    is_hidden: Callable[[str], bool] = lambda name: False,
) -> int:
    """Train with a cosine over the time, in bf16 autocast where the CPU is fast at it.

    Args:
        name: Of the teacher, for the log.
        minutes: Wall-clock time.
        module: Everything that learns.
        loss_of: Maps a batch to the loss, shape [].
        batches: Endless.
        lr: Peak learning rate.
        weight_decay: On matrices.
        clip: Limit of the gradient's norm.
        is_hidden: Which matrices, by name, are trained with Muon (see `tasks.optim`).

    Returns:
        The number of steps.
    """
    import torch

    from infra.machine import fast_bf16

    parameters = list(module.parameters())
    optimizers = build_optimizers(
        module, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay, is_hidden=is_hidden
    )
    autocast, began, step = fast_bf16(), time.monotonic(), 0
    while (spent := (time.monotonic() - began) / (60 * minutes)) < 1:
        scale = learning_rate_scale(
            int(spent * _TICKS),
            _TICKS,
            warmup=int(_WARMUP * _TICKS),
            min_ratio=0.0,
            schedule="cosine",
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(next(batches))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % _LOG_EVERY == 0:
            logger.info(
                "%s %3.0f %% step %d loss %.3f gradient %.2f",
                name, 100 * spent, step, loss.item(), norm,
            )  # fmt: skip
        step += 1
    return step


def save_half(model: Any, out: Path) -> None:
    """Write a `transformers` model as fp16 safetensors and config.json into a folder."""
    import torch

    model.eval().to(dtype=torch.float16, memory_format=torch.contiguous_format)
    model.save_pretrained(out)
