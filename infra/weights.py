"""Tensors in files of others: read without unpickling, refused in words that name the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")
_NAMED = 4
"""Tensors an error names before it only counts."""


def read_safetensors(
    path: str | Path, part: str = ""
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a .safetensors file, of those alone whose names hold `part`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or something else.
    """

    def read() -> tuple[dict[str, str], dict[str, Tensor]]:
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as opened:
            names = [name for name in opened.keys() if part in name]
            return opened.metadata() or {}, {name: opened.get_tensor(name) for name in names}

    return _whole(path, read)


def read_pickled(path: str | Path) -> Any:
    """What `torch.save` has written of tensors and plain values; nothing else is unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds something else.
    """

    def read() -> Any:
        import argparse

        import torch

        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)

    return _whole(path, read)


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuses weights with which a network could compute nothing.

    Raises:
        ValueError: some hold a number that is none, or is infinite; names them.
    """
    import torch

    odd = [name for name, value in tensors.items() if value.is_floating_point()
           and not bool(value.sum(dtype=torch.float64).isfinite())]  # fmt: skip
    if odd:
        more = f" and {len(odd) - _NAMED} more" if len(odd) > _NAMED else ""
        raise ValueError(f"{what} holds values that are no finite numbers, in "
                         f"{', '.join(odd[:_NAMED])}{more}: it is damaged, or of a training that "
                         "diverged; take another")  # fmt: skip


@contextmanager
def named(place: object) -> Iterator[None]:
    """Lets a refusal begin with the place of what is refused."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _whole(path: str | Path, read: Callable[[], _T]) -> _T:
    try:
        return read()
    except (FileNotFoundError, IsADirectoryError, PermissionError, MemoryError):
        raise
    except Exception as error:
        why = str(error).split("\n")[0][:200] or type(error).__name__
        raise ValueError(f"{path} is damaged, or no file of tensors: {why}; copy or download it "
                         "again") from error  # fmt: skip
