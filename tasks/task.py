"""What the one trainer needs to know about a training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.flops import Load

if TYPE_CHECKING:
    import torch
    from torch import nn


class Task:
    """What a training is about. Subclasses are picklable where `fit_distributed` is used."""

    streams: int = 1
    """Number of the random streams that batches are drawn with. A run that has begun with one does
    not go on with another."""

    def identity(self) -> dict[str, Any]:
        """What decides on the training beside `TrainConfig`, as JSON values by name: a run that has
        begun with another does not go on."""
        return {}

    def build_model(self) -> nn.Module:
        """Returns the network with its initial weights (the trainer has set the seed)."""
        raise NotImplementedError

    def batch(self, step: int, rank: int, world: int) -> Any:
        """Returns rows rank::world of the batch of `step`: a pure function, on the CPU. Tensors,
        or tuples, lists, dicts and dataclasses of them, or objects with `.to(device)`."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the scalar to minimise and scalars to log (on the device, without syncing).
        Calls `model(...)`, which may be a DDP wrapper, and not its methods."""
        raise NotImplementedError

    def load(self, batch: Any) -> Load:
        """What a batch, still on the CPU, holds: for token rates, utilisation and schedules in
        tokens."""
        return Load()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Returns validation metrics of the model in evaluation mode, without gradients."""
        return {}

    def is_hidden(self, name: str) -> bool:
        """Whether the 2-D parameter `name` is a hidden matrix, which Muon updates."""
        return False
