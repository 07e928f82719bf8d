"""Rows of a table that a training leaves as they are, while it changes the others.

Modalities share tables, so freezing one of them holds rows of a parameter and not all of it. Their
gradients are set to zero before clipping, and as weight decay moves rows without a gradient too,
they are put back after every update. Both act on whole tables and on those that FSDP2 has spread
by rows; hooks of autograd would be left behind on the tensors that it replaces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.parallel import cut_like, local

if TYPE_CHECKING:
    import torch
    from torch import nn

_HELD = "_held_rows"
"""Attribute of a network: parameter's name -> (numbers of its rows [N], their values [N, ...])."""


def hold_rows(model: nn.Module, name: str, rows: torch.Tensor) -> None:
    """Marks `rows` [N] of the parameter `name` to stay as they are now."""
    held = model.__dict__.setdefault(_HELD, {})
    held[name] = rows, model.get_parameter(name).detach()[rows].clone()


def held_rows(model: nn.Module) -> list[HeldRows]:
    """What was marked, bound to the parameters as they are spread now."""
    return [HeldRows(model.get_parameter(name), rows, values)
            for name, (rows, values) in model.__dict__.get(_HELD, {}).items()]


class HeldRows:
    """This worker's part of the held rows of one parameter."""

    def __init__(self, parameter: nn.Parameter, rows: torch.Tensor, values: torch.Tensor) -> None:
        import torch

        here = cut_like(torch.arange(len(parameter)), parameter)
        mine = torch.isin(rows, here)
        device = local(parameter).device
        self._parameter = parameter
        self._rows = (rows[mine] - (here[0] if len(here) else 0)).to(device)
        self._values = values.cpu()[mine].to(device)

    def clear_gradient(self) -> None:
        """Sets their gradient to zero, also where it is not finite."""
        if self._parameter.grad is not None:
            local(self._parameter.grad).index_fill_(0, self._rows, 0.0)

    def put_back(self) -> None:
        """Overwrites them with their values."""
        local(self._parameter).index_copy_(0, self._rows, self._values)
