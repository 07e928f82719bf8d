"""Flow: the whole chain, each step the flow that can also be run alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from prefect import flow

from infra.ray_session import ray_session
from infra.store import Store
from pipelines import params as forms
from pipelines.evaluate import evaluate_flow
from pipelines.ingest import ingest_flow
from pipelines.label import label_flow
from pipelines.params import EndToEndParams
from pipelines.publish import publish_flow
from pipelines.tokenize import tokenize_flow
from pipelines.train import train_flow
from pipelines.train_tokenizers import train_tokenizers_flow
from tasks.publish import is_current


@flow(name="end-to-end", description=EndToEndParams.__doc__)
def end_to_end_flow(params: EndToEndParams) -> dict[str, Any]:
    """From a list of links to a trained and measured model; resumes wherever it stopped."""
    with _one_session(params):
        ingest_flow(params.part(forms.IngestParams, params.ingest))
        label_flow(params.part(forms.LabelParams, params.label))
        train_tokenizers_flow(params.part(forms.TrainTokenizersParams, params.tokenizers))
        tokenize_flow(params.part(forms.TokenizeParams, params.tokenize))
    publish_flow(params.part(forms.PublishParams, params.publish))
    train_flow(params.part(forms.TrainParams, params.train))
    return evaluate_flow(params.part(forms.EvaluateParams, params.evaluate))


def _one_session(params: EndToEndParams) -> AbstractContextManager[None]:
    """One Ray for all data stages: starting and stopping it takes 15 s each time. Training has
    the machine for itself, and a dataset that is tokenized already needs no Ray at all."""
    if params.workers == 0 or is_current(Store(params.root), params.publish.name):
        return nullcontext()
    return ray_session(params.ray)
