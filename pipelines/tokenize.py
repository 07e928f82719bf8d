"""Flow: every modality of every sample becomes tokens."""

from __future__ import annotations

from typing import Any

from prefect import flow

from infra.automations import version_of
from infra.store import Store
from pipelines.params import TokenizeOptions, TokenizeParams
from pipelines.stages import hand_on, run_jobs, stage_task
from tasks import chain
from tasks.checks import check
from tasks.tokenize import token_jobs


@stage_task("tokenize")
def tokenize_labels(params: TokenizeParams) -> list[dict[str, Any]]:
    """Run every tokenizer over every labelled shard."""
    store = Store(params.root)
    dataset = chain.Chain(store)
    dataset.check("tokenize", params.model_dump(include=set(TokenizeOptions.model_fields)))
    jobs = token_jobs(
        dataset.tokens.values(), dataset.labelled(), labelers=dataset.in_passing
    )
    return run_jobs(store, jobs, params, "tokenize")


@flow(
    name="tokenize",
    flow_run_name="{params.dataset}",
    description=TokenizeParams.__doc__,
)
def tokenize_flow(params: TokenizeParams) -> list[dict[str, Any]]:
    """Turn every modality of every sample into tokens."""
    check("tokenize", params.model_dump())
    choices = params.model_dump(include=set(TokenizeOptions.model_fields))
    chain.remember(Store(params.root), "tokenize", choices)
    rows = tokenize_labels(params)
    dataset = chain.Chain(Store(params.root))
    version = version_of(dataset.ledger, dataset.tokens.values(), dataset.labelled())
    hand_on(dataset.store, "tokenize", version)
    return rows
