"""Flow: predict modalities of files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from prefect import flow

from infra import ui
from infra.store import Store
from pipelines.params import GenerateParams
from pipelines.stages import stage_task
from tasks.generate import generate


@stage_task("generate", counted=False)
def predict(params: GenerateParams) -> list[str]:
    """Decode the targets one after another; each is a condition of the next."""
    files = generate(
        Store(params.root), params.run, params.inputs, params.targets, params.out_dir, params.how()
    )
    _show(files)
    return [str(path) for path in files]


def _show(files: list[Path]) -> None:
    pictures = [
        (path.stem, np.asarray(Image.open(path, formats=("PNG",)).convert("RGB")))
        for path in files
        if path.suffix == ".png"
    ]
    ui.gallery("generated", pictures, "Generated")
    texts = [
        f"**{path.stem}**: {ui.plain(path.read_text())}" for path in files if path.suffix == ".txt"
    ]
    if texts:
        ui.markdown("generated-texts", "\n\n".join(texts))


@flow(
    name="generate",
    flow_run_name="{params.dataset}",
    description=GenerateParams.__doc__,
)
def generate_flow(params: GenerateParams) -> list[str]:
    """Predict modalities from others; returns the files written."""
    return predict(params)
