"""A running mean of a network's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class WeightMean:
    """Exponential mean of tensors that are updated in place; integers are taken as they are.

    After t updates the decay is min(decay, (1 + t) / (10 + t)), so that the first steps, whose
    weights are near their random start, are soon forgotten.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], decay: float) -> None:
        self.decay, self._of = decay, dict(tensors)
        self.tensors = {name: value.clone() for name, value in self._live().items()}

    def _live(self) -> dict[str, torch.Tensor]:
        """The weights themselves; looked up anew each time, as FSDP moves its shards once."""
        from tasks.parallel import local

        return {name: local(value) for name, value in self._of.items()}

    def update(self, step: int) -> None:
        """Takes the weights after optimizer step number `step`, from 0."""
        import torch

        weight, live = 1 - min(self.decay, (1 + step) / (10 + step)), self._live()
        smooth = [name for name, value in live.items() if value.is_floating_point()]
        with torch.no_grad():
            torch._foreach_lerp_([self.tensors[n] for n in smooth], [live[n] for n in smooth],
                                 weight)
            for name in live.keys() - set(smooth):
                self.tensors[name].copy_(live[name])

    def apply(self) -> None:
        """Overwrites the weights with their mean."""
        for name, value in self._live().items():
            value.copy_(self.tensors[name])
