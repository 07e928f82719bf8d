"""Tensors of a checkpoint by name and shape: what a network's sizes are told from."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_SPREAD = 4
"""Modules of a list for each that has a tensor: some, such as activations, have none."""
_NAMED = 4
"""Tensors an error names before it only counts."""


class Shapes:
    """Shapes of a checkpoint's tensors below a prefix."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str) -> tuple[int, ...]:
        full = self._prefix + name
        if full not in self._tensors:
            raise ValueError(f"the checkpoint lacks the tensor {full}")
        return tuple(self._tensors[full].shape)

    def below(self, name: str) -> Shapes:
        """Those of a submodule."""
        return Shapes(self._tensors, f"{self._prefix}{name}.")

    def has(self, start: str) -> bool:
        """Whether any name starts so."""
        return any(name.startswith(self._prefix + start) for name in self._tensors)

    def count(self, name: str) -> int:
        """Number of modules of a list. Raises ValueError for one that no file can hold."""
        start = f"{self._prefix}{name}."
        numbers = [key[len(start) :].split(".")[0] for key in self._tensors if
                   key.startswith(start)]
        found = max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)
        if found > _SPREAD * len(numbers):
            raise ValueError(f"the checkpoint names {start}{found - 1}, but few before it")
        return found


def require_equal(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Refuses tensors that are not exactly those of a network.

    Raises:
        ValueError: some are missing, surplus or of another shape; names them.
    """
    found = {
        "lacks": sorted(wanted.keys() - tensors.keys()),
        "holds besides": sorted(tensors.keys() - wanted.keys()),
        "holds in another shape": [
            f"{name} {tuple(tensors[name].shape)}, not {tuple(wanted[name].shape)}"
            for name in sorted(wanted.keys() & tensors.keys())
            if tensors[name].shape != wanted[name].shape
        ],
    }
    texts = []
    for verb, names in found.items():
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            texts.append(f"{verb} {', '.join(names[:_NAMED])}{more}")
    if texts:
        raise ValueError(f"the checkpoint {'; it '.join(texts)}")
