"""Flow: the whole chain, each step the flow that can also be run alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from prefect import flow

from infra import ui
from infra.ray_session import ray_session
from infra.status import as_rows, status
from infra.store import Store
from pipelines import params as forms
from pipelines.evaluate import evaluate_flow
from pipelines.ingest import ingest_flow
from pipelines.label import label_flow
from pipelines.params import EndToEndParams
from pipelines.publish import publish_flow
from pipelines.remote import is_remote
from pipelines.tokenize import tokenize_flow
from pipelines.train import train_flow
from pipelines.train_tokenizers import train_tokenizers_flow
from tasks.chain import Chain
from tasks.publish import is_current
from tasks.report import show_results


@flow(
    name="end-to-end",
    flow_run_name="{params.dataset}",
    description=EndToEndParams.__doc__,
)
def end_to_end_flow(params: EndToEndParams) -> dict[str, Any]:
    """From a list of links to a trained and measured model; resumes wherever it stopped."""
    with _one_session(params):
        ingest_flow(params.part(forms.IngestParams, params.ingest))
        label_flow(params.part(forms.LabelParams, params.label))
        train_tokenizers_flow(params.part(forms.TrainTokenizersParams, params.tokenizers))
        tokenize_flow(params.part(forms.TokenizeParams, params.tokenize))
    publish_flow(params.part(forms.PublishParams, params.publish))
    trained = train_flow(params.part(forms.TrainParams, params.train))
    measured = params.evaluate.model_copy(update={"run": params.evaluate.run or trained["run"]})
    found = evaluate_flow(params.part(forms.EvaluateParams, measured))
    _show(Store(params.root), found)
    return found


def _show(store: Store, found: dict[str, Any]) -> None:
    """What all came to, at the run of the chain; more is shown at those of its steps."""
    ui.table("chain-stages", as_rows(status(store)), f"Stages of {store.url}")
    show_results(found)


def _one_session(params: EndToEndParams) -> AbstractContextManager[None]:
    """One Ray for all data stages: starting and stopping it takes 15 s each time. Training has
    the machine for itself, a dataset that is tokenized already needs no Ray at all, and a stage
    that runs as a job has the Ray of that job."""
    if params.workers == 0 or is_remote(params):
        return nullcontext()
    store = Store(params.root)
    tokenized = _chosen_before(store, params) and is_current(store, params.publish.name)
    return nullcontext() if tokenized else ray_session(params.ray)


def _chosen_before(store: Store, params: EndToEndParams) -> bool:
    """Whether earlier runs made the same choices."""
    wanted = {
        "ingest": params.ingest,
        "label": params.label,
        "tokenizers": params.tokenizers,
        "tokenize": params.tokenize,
    }
    known = Chain(store).settings
    return all(
        known.get(name, {}).items() >= options.model_dump().items()
        for name, options in wanted.items()
    )
