"""Cases of a folder, families that know them, and the comparisons they are made of.

    @family("vqvae_*")
    def vqvae(case: Case) -> list[Check]:
        net, tensors = load(case.checkpoint), case.tensors()
        return [close("decoded", net(tensors["input"]), tensors["decoded"], 2e-5)]
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MANIFEST = "MANIFEST.json"
SUFFIXES = (".json", ".safetensors", ".ckpt")


class Check(NamedTuple):
    """One comparison of a case."""

    what: str
    error: float
    """Largest error, or the number of differing entries where the tolerance is 0."""
    tolerance: float

    @property
    def ratio(self) -> float:
        """Error over tolerance: above 1 the check has failed."""
        if not math.isfinite(self.error):
            return math.inf
        if not self.tolerance:
            return math.inf if self.error else 0.0
        return self.error / self.tolerance


@dataclass(frozen=True)
class Case:
    """One case: `<name>.json`, and `<name>.safetensors` and `<name>.ckpt/` where it has them."""

    folder: Path
    name: str

    @cached_property
    def info(self) -> dict[str, Any]:
        """What `<name>.json` says."""
        return json.loads((self.folder / f"{self.name}.json").read_text(encoding="utf-8"))

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """Tensors of `<name>.safetensors` by name."""
        from safetensors.torch import load_file

        return load_file(self.folder / f"{self.name}.safetensors")

    @property
    def checkpoint(self) -> Path:
        """The checkpoint folder: the one the case names, or its own."""
        return self.folder / self.info.get("checkpoint", f"{self.name}.ckpt")


Family = Callable[[Case], Sequence[Check]]
_families: dict[str, Family] = {}


def family(*patterns: str) -> Callable[[Family], Family]:
    """Registers a function for the cases whose name fits one of `patterns` (as file names do)."""

    def add(function: Family) -> Family:
        for pattern in patterns:
            if pattern in _families:
                raise ValueError(f"two families claim {pattern!r}")
            _families[pattern] = function
        return function

    return add


def find(name: str) -> Family | None:
    """The function that knows the case `name`, or None. The longest fitting pattern wins."""
    _load_families()
    fitting = [pattern for pattern in _families if fnmatchcase(name, pattern)]
    return _families[max(fitting, key=len)] if fitting else None


def _load_families() -> None:
    """Imports the modules of this package, which register what they know."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if not path.stem.startswith(("_", "test_")) and path.stem != "registry":
            importlib.import_module(f"{__package__}.{path.stem}")


def cases(folder: Path) -> list[Case]:
    """All cases of a folder, by name: of every file in it and every file its manifest lists."""
    files = {path.name for path in folder.iterdir()} | {name.split("/")[0] for name in
                                                        listed(folder)}
    files -= {MANIFEST}
    stems = {name[: -len(s)] for name in files for s in SUFFIXES if name.endswith(s)}
    return [Case(folder, stem) for stem in sorted(stems)]


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    """Files of the folder's manifest with their size and sha256; empty without a manifest."""
    path = folder / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def damaged(case: Case) -> list[str]:
    """What the manifest says of the case's files and is not so."""
    found = []
    for name, entry in listed(case.folder).items():
        if not any(name.startswith(f"{case.name}{suffix}") for suffix in SUFFIXES):
            continue
        path = case.folder / name
        if not path.exists():
            found.append(f"{name} is missing")
        elif sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            found.append(f"{name} is not what the manifest lists")
    return found


def array(value: Any) -> np.ndarray:
    """A tensor, array or list as an array."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def close(what: str, got: Any, want: Any, tolerance: float) -> Check:
    """Largest absolute difference; infinite when the shapes differ."""
    got, want = array(got).astype(np.float64), array(want).astype(np.float64)
    if got.shape != want.shape:
        return Check(f"{what} (shape {got.shape}, not {want.shape})", math.inf, tolerance)
    return Check(what, float(np.abs(got - want).max()) if got.size else 0.0, tolerance)


def relative(what: str, got: Any, want: Any, tolerance: float) -> Check:
    """Largest difference over the largest expected magnitude."""
    scale = float(np.abs(array(want).astype(np.float64)).max(initial=0.0)) or 1.0
    check = close(what, got, want, tolerance)
    return check._replace(error=check.error / scale)


def exact(what: str, got: Any, want: Any) -> Check:
    """Number of entries that differ; infinite when the shapes differ."""
    got, want = array(got), array(want)
    if got.shape != want.shape:
        return Check(f"{what} (shape {got.shape}, not {want.shape})", math.inf, 0.0)
    return Check(what, float((got != want).sum()), 0.0)
