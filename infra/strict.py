"""Arrays, JSON and pictures in files of others: read strictly, whatever they promise."""

from __future__ import annotations

import io
import json
import math
import types
import zipfile
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.lib import format as npy_format

_T = TypeVar("_T")

_HINTS: dict[type[Any], dict[str, Any]] = {}

MAX_UNPACKED = 1 << 28
"""Most bytes of an array of an `.npz`, which may be packed a thousandfold."""

READS, READ_BYTES = 1000, 64
"""A picture may be read in so many pieces and in one more for each so many of its bytes. Encoders
write pieces of kilobytes; 20 MB of empty ones would keep the interpreter busy for ten seconds."""


class Endless(ValueError):
    """A picture that is taken apart without end."""


class Pieces(io.BytesIO):
    """Bytes of a picture that cannot be taken apart without end."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left = READS + len(data) // READ_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file.

        Raises:
            Endless: it was called too often.
        """
        self._left -= 1
        if self._left < 0:
            raise Endless("taken apart into pieces of a few bytes without end")
        return super().read(size)


def read_npy(data: bytes, what: str = "it") -> np.ndarray:
    """The array of an `.npy`. Nothing is unpickled, and no memory is taken for what is not there.

    Raises:
        ValueError: anything else.
    """
    file = io.BytesIO(data)
    try:
        version = npy_format.read_magic(file)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"version {version} is not known")
        first = version == (1, 0)
        read = npy_format.read_array_header_1_0 if first else npy_format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise ValueError("it holds pickled objects")
        if math.prod(shape) * dtype.itemsize > len(data) - file.tell() or min(shape, default=0) < 0:
            raise ValueError(f"{len(data)} bytes do not hold {dtype} {shape}")
        flat = np.frombuffer(data, dtype, math.prod(shape), file.tell())
        return flat.reshape(shape, order="F" if fortran else "C").copy()
    except Exception as error:
        raise ValueError(f"{what} is not a plain .npy: {error}") from error


def read_npz(data: bytes, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The named arrays of an `.npz`, as far as they are there.

    Raises:
        ValueError: it is none, it is damaged, or an array takes more than `MAX_UNPACKED` bytes.
    """
    found = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in names:
                if f"{name}.npy" not in archive.namelist():
                    continue
                with archive.open(f"{name}.npy") as member:
                    unpacked = member.read(MAX_UNPACKED + 1)
                if len(unpacked) > MAX_UNPACKED:
                    raise ValueError(f"{name} is longer than {MAX_UNPACKED} bytes")
                found[name] = read_npy(unpacked, name)
    except Exception as error:
        raise ValueError(f"not a plain .npz: {error}") from error
    return found


def read_json(data: bytes) -> Any:
    """The value of JSON. Raises ValueError for anything else, also where it is nested too deep."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def typed(kind: type[_T], value: Any, what: str) -> _T:
    """The dataclass whose fields are those of a JSON object.

    Raises:
        ValueError: a field is missing, unknown or of another type; names it and `what`.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no object")
    hints = _HINTS.get(kind) or _HINTS.setdefault(kind, get_type_hints(kind))
    for name, each in value.items():
        if name in hints and not is_of(each, hints[name]):
            raise ValueError(f"{what}: {name} is {str(each)[:80]!r}, not {hints[name]}")
    return known(kind, value, what)


def known(kind: type[_T], value: dict[str, Any], what: str) -> _T:
    """The dataclass of these fields, whatever they hold.

    Raises:
        ValueError: a field is missing or unknown; names it and `what`.
    """
    hints = _HINTS.get(kind) or _HINTS.setdefault(kind, get_type_hints(kind))
    if unknown := sorted(map(repr, value.keys() - hints.keys())):
        raise ValueError(f"{what}: unknown {', '.join(unknown)[:80]}; if a newer version of this "
                         "software wrote it, take that one")
    try:
        return kind(**value)
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from error


def is_of(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of a type; finite where that is float, 64 bits where it is int."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in args
    if origin in (Union, types.UnionType):
        return any(is_of(value, each) for each in args)
    if origin is dict:
        return isinstance(value, dict) and all(
            is_of(k, args[0]) and is_of(v, args[1]) for k, v in value.items()
        )
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(is_of(each, args[0]) for each in value)
    if hint is float:
        return type(value) in (int, float) and -1e300 < value < 1e300
    if hint is int:
        return type(value) is int and abs(value) < 1 << 63
    return hint is Any or isinstance(value, hint)
