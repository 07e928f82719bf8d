"""What forward passes of a training move by themselves, as the codes of a tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


class Buffers:
    """The persistent buffers of a network. A step that is skipped leaves them as they were: a
    single latent that is not finite would stay in a codebook for good."""

    def __init__(self, model: nn.Module) -> None:
        stored = model.state_dict().keys()
        self._model = model
        self._names = [name for name, _ in model.named_buffers() if name in stored]
        self._kept: list[torch.Tensor] = []

    def keep(self) -> None:
        """Notes them before the forward passes of a step."""
        self._kept = [self._model.get_buffer(name).clone() for name in self._names]

    def put_back(self, skipped: torch.Tensor) -> None:
        """Undoes what has moved them since, if `skipped` [] is true; the host need not know."""
        import torch

        for name, before in zip(self._names, self._kept, strict=True):
            now = self._model.get_buffer(name)
            now.copy_(torch.where(skipped, before, now))
