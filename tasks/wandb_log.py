"""The loss curve on Weights & Biases, for those who ask for it."""

from __future__ import annotations

import hashlib
import importlib
import re
from typing import Any


def require_wandb(project: str) -> None:
    """Raises ValueError where a project is named and the package is missing."""
    if not project:
        return
    try:
        importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(f"wandb={project!r} needs the package wandb: pip install wandb, or leave "
                         "it empty (TensorBoard is always written)") from error


def open_run(project: str, url: str, path: str, config: dict[str, Any]) -> Any:
    """The run of the training at `path` of the store at `url`; a resumed one goes on in it."""
    wandb = importlib.import_module("wandb")
    digest = hashlib.sha256(f"{url}/{path}".encode()).hexdigest()[:8]
    name = re.sub(r"[^\w-]+", "-", path)
    return wandb.init(project=project, id=f"{name}-{digest}", name=path, config=config,
                      resume="allow")
