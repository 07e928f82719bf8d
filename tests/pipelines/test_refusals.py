"""A flow that is told what cannot work is refused and forgets it, whoever started it."""

import importlib

import pytest
from s3fs import S3FileSystem

from infra.store import Store
from pipelines import params
from tasks.chain import FILE
from tasks.checks import check

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


def test_a_list_in_s3_without_credentials_is_named_and_how_public_ones_are_read(
    tmp_path, monkeypatch
):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "FSSPEC_S3_ANON"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(S3FileSystem, "_cache", {})  # those of other tests know their own way
    form = params.IngestParams(root=str(tmp_path), source="s3://bucket/list.tsv")
    with pytest.raises(ValueError, match=r"s3://bucket/list\.tsv cannot .*FSSPEC_S3_ANON=true"):
        check("ingest", form.model_dump())
