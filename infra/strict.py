"""Arrays and JSON in files of others: read strictly, whatever they promise."""

from __future__ import annotations

import io
import json
import math
import zipfile
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

MAX_UNPACKED = 1 << 28
"""Most bytes of an array of an `.npz`, which may be packed a thousandfold."""


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
