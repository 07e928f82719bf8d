"""The 4M network: configuration, batch, masking, model, released checkpoints.

    model = fourm.load("EPFL-VILAB/4M-21_B@<commit>")     # or a folder
    fourm.save_released(model, "my-model")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.fourm.backbone import Backbone, embed
    from models.fourm.checkpoint import load, save_released

__all__ = ["Backbone", "embed", "load", "save_released"]

_HOMES = {"Backbone": "backbone", "embed": "backbone", "load": "checkpoint",
          "save_released": "checkpoint"}


def __getattr__(name: str) -> Any:
    # The command line imports parts of this package and must not wait for torch.
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
