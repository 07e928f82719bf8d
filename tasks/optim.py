"""Optimisers and learning-rate schedules of the one trainer.

Muon (Jordan et al. 2024, `torch.optim.Muon`) orthogonalises the update of hidden matrices and
takes AdamW's learning rate through `match_rms_adamw`; everything else is fused AdamW.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

Schedule = Literal["cosine", "wsd"]
DECAY_SHARE = 0.3  # of a "wsd" run that is spent on the final linear decay


def learning_rate_scale(
    step: float, steps: float, *, warmup: float, min_ratio: float, schedule: Schedule
) -> float:
    """Factor in [min_ratio, 1] on the peak learning rate at `step` in 0..steps-1.

    A schedule in tokens gives all three lengths in units of the tokens of its present step.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "wsd":
        shape = min(1.0, max(0.0, 1.0 - progress) / DECAY_SHARE)
    else:
        shape = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return min_ratio + (1.0 - min_ratio) * shape


def build_optimizers(
    model: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    is_hidden: Callable[[str], bool],
) -> list[torch.optim.Optimizer]:
    """Returns AdamW over all parameters but those 2-D matrices whose name `is_hidden` accepts,
    which Muon gets. Only tensors of two or more dimensions are decayed."""
    import torch

    hidden: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim == 2 and is_hidden(name):
            hidden.append(parameter)
        else:
            (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    groups = [group for group in groups if group["params"]]
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True))
    if hidden:
        optimizers.append(
            torch.optim.Muon(
                hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    return optimizers
