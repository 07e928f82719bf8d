"""Gradients between the backward pass and the update: their norm, and those of tables.

A batch looks up two thousand of a table's hundred thousand rows, and the rest of its gradient is
zeros. To fill and read those is a tenth of a step of 4M-Tiny on two cores, so in a training on one
CPU tables leave the rows to `Gradients`, which adds them to the gradient that the matrix has, or to
one that is kept from step to step and cleared in these rows alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.machine import fp32_products
from tasks.parallel import is_sharded

if TYPE_CHECKING:
    import torch
    from torch import nn


class Gradients:
    """The gradients of the parameters of a network; `by_rows` lets its tables collect theirs,
    until `close`."""

    def __init__(self, model: nn.Module, *, by_rows: bool) -> None:
        from models.fourm.embeddings import TokenTable

        self._parameters = list(model.parameters())
        self._tables = [part for part in model.modules() if isinstance(part, TokenTable)] \
            if by_rows else []
        for table in self._tables:
            table.collected = []
        self._kept: dict[nn.Parameter, torch.Tensor] = {}
        self._rows: dict[nn.Parameter, torch.Tensor] = {}

    def fill(self) -> None:
        """Adds what tables have collected to their gradients."""
        import torch

        for table in self._tables:
            if not table.collected:
                continue
            weight, rows = table.weight, torch.cat([rows for rows, _ in table.collected])
            vectors = torch.cat([vectors for _, vectors in table.collected])
            if weight.grad is None:
                if weight not in self._kept:
                    self._kept[weight] = torch.zeros_like(weight)
                weight.grad, self._rows[weight] = self._kept[weight], rows.unique()
            weight.grad.index_add_(0, rows, vectors)
            table.collected.clear()

    def norm(self) -> torch.Tensor:
        """The norm of all of them."""
        import torch

        found = [parameter.grad if parameter not in self._rows else
                 parameter.grad[self._rows[parameter]]
                 for parameter in self._parameters if parameter.grad is not None]
        if any(grad.device.type != "cpu" or is_sharded(grad) for grad in found):
            return torch.nn.utils.get_total_norm(found)
        # Twice as fast there as norms are, and closer: norms of long vectors lose digits.
        flat = [grad.reshape(-1) for grad in found]
        # Where products round, dot products take seven times as long for the same result.
        with fp32_products("cpu", rounded=False):
            return torch.stack([torch.dot(grad, grad) for grad in flat]).sum().sqrt()

    def divide(self, factor: torch.Tensor) -> None:
        """Divides all of them, where no optimizer does."""
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.div_(factor)

    def clear(self) -> None:
        """Sets what is kept to zero, once parameters have let go of it."""
        for weight, rows in self._rows.items():
            self._kept[weight].index_fill_(0, rows, 0.0)
        self._rows.clear()

    def close(self) -> None:
        """Tables have gradients of their own again."""
        for table in self._tables:
            table.collected = None
