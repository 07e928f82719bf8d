"""Guidance: what a model predicts under conditions, pushed away from what it predicts without.

All branches of a step, the one without conditions and each one with, lie below one another in one
batch, so that a step is one forward pass whatever their number (classifier-free guidance, Ho and
Salimans, arXiv 2207.12598; several weighted conditions as in 4M).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.fourm.conditions import FIRST, Shown
from models.fourm.spec import FourMConfig, ModalitySpec

Inputs = dict[str, Shown]


@dataclass(frozen=True)
class Branch:
    """Conditions that are shown beside those of all branches, and their weight.

    A negative weight leads away from them. The same modality may stand in several branches.
    """

    shown: Mapping[str, Shown]
    weight: float

    def rows(self, index: Tensor) -> Branch:
        """The rows picked by `index`."""
        return Branch({name: part.rows(index) for name, part in self.shown.items()}, self.weight)

    def without(self, name: str) -> Branch:
        """The same without a modality."""
        return Branch({key: part for key, part in self.shown.items() if key != name}, self.weight)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly a target follows its conditions; l_u are logits of the unconditional branch."""

    scale: float | Mapping[str, float] = 1.0
    """s of l_u + s (l_c - l_u), or a weight for each of some conditions."""
    guided: frozenset[str] | None = None
    """Conditions that a scale acts on; None is all."""
    branches: Sequence[Branch] = ()
    """Further conditions, each with its weight."""

    def __post_init__(self) -> None:
        if self.branches and not isinstance(self.scale, Mapping) and self.scale != 1.0:
            raise ValueError(
                f"a guidance scale ({self.scale}) and weighted conditions exclude each other; "
                "set guidance=1.0"
            )

    def rows(self, index: Tensor) -> Guidance:
        """Guidance of the rows picked by `index`."""
        return Guidance(scale=self.scale, guided=self.guided,
                        branches=[branch.rows(index) for branch in self.branches])  # fmt: skip

    def inputs(
        self, config: FourMConfig, shown: Mapping[str, Shown], target: str
    ) -> tuple[Inputs, tuple[float, ...]]:
        """The inputs of all branches below one another, unconditional first, and their weights.

        Args:
            config: The model's.
            shown: Conditions [R rows], the target's own known part among them.
            target: Name of the target.

        Raises:
            ValueError: a weight is given for what is no condition; lists those there are.
        """
        if not config.by_name[target].is_input:
            others = {name: part for name, part in shown.items() if name != target}
            # The encoder needs a slot to read, though it never sees this target.
            shown = others or {name: Shown(part.values, torch.zeros_like(part.visible))
                               for name, part in shown.items()}  # fmt: skip
        conditions = set(shown) - {target}
        if isinstance(self.scale, Mapping):
            base, sides = self._weighted(shown, conditions, self.scale)
        else:
            guided = conditions if self.guided is None else conditions & self.guided
            if not self.branches and (self.scale == 1.0 or not guided):
                return dict(shown), ()
            base, sides = dict(shown), []
            if not self.branches:
                base = {name: _hidden(config.by_name[name], part) if name in guided else part
                        for name, part in shown.items()}  # fmt: skip
                sides = [(dict(shown), float(self.scale))]
        sides += [(base | dict(branch.shown), branch.weight) for branch in self.branches]
        stacked = _stacked([base, *(side for side, _ in sides)])
        return stacked, tuple(weight for _, weight in sides)

    def _weighted(
        self, shown: Mapping[str, Shown], conditions: set[str], weights: Mapping[str, float]
    ) -> tuple[Inputs, list[tuple[Inputs, float]]]:
        unknown = sorted(set(weights) - conditions)
        if unknown:
            raise ValueError(f"guided by {unknown[0]}, but the conditions are {sorted(conditions)}")
        base = {name: part for name, part in shown.items() if name not in weights}
        return base, [(base | {name: shown[name]}, weight) for name, weight in weights.items()]


def combined(values: Tensor, weights: tuple[float, ...]) -> Tensor:
    """l_u + sum of w_i (l_i - l_u) of the values [(1 + weights) * R, ...] of all branches: logits,
    or what logits are a linear function of."""
    if not weights:
        return values
    base, *others = values.chunk(len(weights) + 1)
    pairs = zip(weights, others, strict=True)
    return torch.add(base, sum(weight * (other - base) for weight, other in pairs))


def _hidden(spec: ModalitySpec, part: Shown) -> Shown:
    """A condition as an unconditional branch sees it: nothing, or a sequence wholly masked."""
    visible = torch.zeros_like(part.visible)
    if spec.kind in ("img", "pixels"):
        return Shown(part.values, visible)
    visible[:, 0] = True
    values = part.values.clone()
    values[:, 0] = FIRST if spec.kind == "seq" else 0
    return Shown(values, visible)


def _stacked(branches: Sequence[Inputs]) -> Inputs:
    """All branches as one batch; what a branch lacks is hidden in its rows."""
    stacked = {}
    for name in sorted({name for branch in branches for name in branch}):
        some = next(branch[name] for branch in branches if name in branch)
        absent = Shown(some.values, torch.zeros_like(some.visible))
        parts = [branch.get(name, absent) for branch in branches]
        length = max(part.visible.shape[1] for part in parts)
        parts = [part.padded(length) for part in parts]
        stacked[name] = Shown(torch.cat([part.values for part in parts]),
                              torch.cat([part.visible for part in parts]))  # fmt: skip
    return stacked
