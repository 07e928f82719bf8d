"""Flow: learn the codes of every modality."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from prefect import flow

from infra import ui
from infra.machine import cores
from infra.store import Store
from pipelines.params import TokenizerOptions, TrainTokenizersParams
from pipelines.stages import hand_on, stage_task
from pipelines.workers import gpus_each
from tasks import chain
from tasks.checks import check
from tasks.shared_tokenizers import take_tokenizers
from tasks.train_tokenizers import TokenizerInfo, train_tokenizers


@stage_task("train tokenizers")
def learn_codes(params: TrainTokenizersParams) -> list[dict[str, Any]]:
    """Train what is not there yet: one tokenizer a core at a time, and WordPiece for the text."""
    store = Store(params.root)
    dataset = chain.Chain(store)
    workers = cores() if params.workers is None else params.workers
    bar = ui.progress("train tokenizers")
    found = train_tokenizers(
        store,
        dataset.sources,
        dataset.recipes,
        shards=dataset.tokenizer_shards,
        text=dataset.text_recipe,
        target=params.ray,
        workers=workers,
        gpus=gpus_each(params),
        on_progress=lambda name, step, steps: bar.update(step, steps, f"{name} {step}/{steps}"),
    )
    return _rows(found)


@stage_task("take tokenizers")
def take_codes(params: TrainTokenizersParams) -> list[dict[str, Any]]:
    """Copy those of another dataset."""
    found = take_tokenizers(Store(params.root), params.like)
    ui.table("tokenizers", rows := _rows(found), f"Tokenizers of {params.like}")
    return rows


def _rows(found: dict[str, TokenizerInfo]) -> list[dict[str, Any]]:
    return [
        {"modality": name, "path": info.path, "codes": info.vocab_size, **info.metrics}
        for name, info in found.items()
    ]


@flow(
    name="train-tokenizers",
    flow_run_name="{params.dataset}",
    description=TrainTokenizersParams.__doc__,
)
def train_tokenizers_flow(params: TrainTokenizersParams) -> list[dict[str, Any]]:
    """Train the tokenizers that turn each modality into discrete codes and back."""
    check("train_tokenizers", params.model_dump())
    store = Store(params.root)
    if params.like:
        rows = take_codes(params)
    else:
        choices = params.model_dump(include=set(TokenizerOptions.model_fields))
        chain.remember_tokenizers(store, choices)
        rows = learn_codes(params)
    learned = json.dumps(sorted(row["path"] for row in rows))
    hand_on(store, "train-tokenizers", hashlib.sha256(learned.encode()).hexdigest()[:16])
    return rows
