"""A flow that is told what cannot work is refused and forgets it, whoever started it."""

import importlib

import pytest

from infra.store import Store
from pipelines import params
from tasks.chain import FILE

FLOWS = {
    "ingest": (params.IngestParams, {"source": "no-list.csv"}),
    "label": (params.LabelParams, {}),
    "train_tokenizers": (params.TrainTokenizersParams, {}),
    "tokenize": (params.TokenizeParams, {}),
    "publish": (params.PublishParams, {}),
}


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_that_a_form_has_started_writes_no_choices_down_that_cannot_work(name, tmp_path):
    form, choices = FLOWS[name]
    flow = getattr(importlib.import_module(f"pipelines.{name}"), f"{name}_flow")
    store = Store(str(tmp_path))
    with pytest.raises(ValueError, match=r"there is nothing at|no pictures were ingested"):
        flow.fn(form(root=str(tmp_path), **choices))
    assert not store.exists(FILE)
