"""Choices of how tokens are made, from the forms to a trained 4M: feature maps that are never
stored, and ordered tokens of which few are kept."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from infra.blocks import BlockReader
from infra.ledger import Ledger, ShardData, Stage
from infra.ray_session import Embedded
from infra.runner import Resources, run_stages
from infra.shards import sample_key, write_tar
from infra.store import Store
from infra.verify import verify
from models.fourm.checkpoint import load_stored
from models.fourm.generate import Generator
from pipelines.params import IngestOptions, LabelOptions, TokenizeOptions, TokenizerOptions
from tasks.chain import Chain, remember, remember_tokenizers
from tasks.checks import check
from tasks.fetch import make_plan
from tasks.label import label_jobs
from tasks.publish import publish_tokens
from tasks.specs import modality_specs
from tasks.tokenize import token_jobs
from tasks.train import train_fourm
from tasks.train_tokenizers import train_tokenizers
from tests.tasks.test_train import TINY
from tokenizers_vq.text import FILE, TextTokenizer
from tokenizers_vq.tokenizer import load_tokenizer

ROWS, SHARDS, SIZE, HERE = 5, 3, 32, Resources(workers=0)
SMALL = {"width": 32, "steps": 3, "batch_size": 4}


def _picture(number: int) -> bytes:
    rng = np.random.default_rng(number)
    image = np.kron(rng.integers(0, 256, (4, 4, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _ingested(folder: Path) -> Store:
    torch.set_num_threads(1)
    source = folder / "list.tsv"
    source.write_text("".join(f"http://a.org/{i}.png\ttext {i}\n" for i in range(ROWS * SHARDS)))
    store = Store(str(folder / "data"))
    make_plan(store, str(source), shard_rows=ROWS)
    remember(store, "ingest", IngestOptions(source=str(source)).model_dump())
    chain = Chain(store)
    for shard in range(SHARDS):
        keys = [sample_key(shard, row) for row in range(ROWS)]
        pictures = ((f"{key}.jpg", _picture(10 * shard + row)) for row, key in enumerate(keys))
        words = ((f"{key}.txt", f"a square number {key}".encode()) for key in keys)
        outputs = {"rgb": write_tar(pictures), "caption": write_tar(words)}
        data = ShardData(keys, outputs, [(key, "ok", "") for key in keys], 1.0)
        chain.ledger.commit(chain.fetch, shard, data)
    return store


def _label(store: Store, **choices: Any) -> Chain:
    """What the label flow does."""
    options = LabelOptions(preset="scenes", device="cpu", precision="fp32", **choices).model_dump()
    check("label", {**options, "root": store.url})
    remember(store, "label", options)
    chain = Chain(store)
    jobs = [
        dataclasses.replace(job, shards=tuple(chain.label_shards(job.stage, job.shards)))
        for job in label_jobs(chain.labelers.values(), chain.fetch, range(SHARDS))
    ]
    run_stages(store, jobs, target=Embedded(), resources=HERE)
    return chain


def _tokenize(store: Store, learned: dict[str, Any], **choices: Any) -> Chain:
    """What the flows that train tokenizers and tokenize do."""
    options = TokenizerOptions(size=SIZE, max_samples=20, coordinate_bins=32, **learned)
    check("train_tokenizers", {**options.model_dump(), "root": store.url})
    remember_tokenizers(store, options.model_dump())
    chain = Chain(store)
    train_tokenizers(
        store, chain.sources, chain.recipes, shards=chain.tokenizer_shards, text=chain.text_recipe
    )
    remember(store, "tokenize", TokenizeOptions(crops=2, **choices).model_dump())
    chain = Chain(store)
    jobs = token_jobs(chain.tokens.values(), chain.labelled(), precision="fp32", device="cpu",
                      labelers=chain.in_passing)
    reports = run_stages(store, jobs, target=Embedded(), resources=HERE)
    assert all(report.done + report.skipped == SHARDS for report in reports.values())
    return chain


def _rows(chain: Chain, stage: Stage, shard: int) -> np.ndarray:
    path, _ = chain.ledger.open_output(stage, shard, stage.outputs[0])
    tokens, valid = BlockReader(path).fixed("crop1")
    assert valid.all()
    return tokens


def test_features_are_tokenized_without_being_stored_to_the_tokens_of_stored_ones(tmp_path):
    learned = {"modalities": ["clip"], "changes": {"clip": SMALL}}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    passing, storing = _ingested(tmp_path / "a"), _ingested(tmp_path / "b")
    chain = _label(passing, labelers=["clip"], one_pass=["clip"], one_pass_shards=1)
    assert chain.ledger.committed(chain.labels["clip"]) == {0}
    assert chain.labelled() == [0, 1, 2]
    assert chain.labelled(stored=True) == [0]
    chain = _tokenize(passing, learned)
    assert chain.ledger.committed(chain.labels["clip"]) == {0}

    whole = _label(storing, labelers=["clip"])
    remember(storing, "tokenizers", chain.section("tokenizers"))
    for name, data in _files(passing, chain.tokenizers["clip"].path).items():
        storing.write(name, data)
    for name, data in _files(passing, chain.tokenizers["text"].path).items():
        storing.write(name, data)
    remember(storing, "tokenize", chain.section("tokenize"))
    whole = Chain(storing)
    jobs = token_jobs(whole.tokens.values(), whole.labelled(), precision="fp32", device="cpu")
    run_stages(storing, jobs, target=Embedded(), resources=HERE)
    assert whole.tokens["clip"].fingerprint == chain.tokens["clip"].fingerprint
    for shard in range(SHARDS):
        ours, theirs = (_rows(each, each.tokens["clip"], shard) for each in (chain, whole))
        assert (ours == theirs).all()
    made = chain.ledger.read_commit(chain.tokens["clip"], 2)
    assert list(made.upstream) == [f"{chain.fetch.id}/2"]
    publish_tokens(passing, "main", val_share=0.3)
    assert verify(passing, deep=True).ok


def _files(store: Store, folder: str) -> dict[str, bytes]:
    return {name: store.read(name) for name in store.list(f"{folder}/")}


def test_one_pass_is_refused_for_labels_that_others_look_at_or_that_are_not_made(tmp_path):
    store = _ingested(tmp_path)
    with pytest.raises(ValueError, match="one_pass names 'depth', which is not among the labelers"):
        _label(store, labelers=["clip"], one_pass=["depth"])
    with pytest.raises(ValueError, match="'metadata' looks at labels of 'det'"):
        _label(store, labelers=["det", "metadata"], one_pass=["det"])


def test_a_modality_of_ordered_tokens_costs_4m_as_few_as_were_chosen(tmp_path):
    store = _ingested(tmp_path)
    remember(store, "label", LabelOptions(preset="scenes", labelers=[]).model_dump())
    learned = {"modalities": ["rgb"],
               "changes": {"rgb": {**SMALL, "patch": 8, "registers": 12}}}
    chain = _tokenize(store, learned, tokens={"rgb": 5})
    assert _rows(chain, chain.tokens["rgb"], 1).shape == (ROWS, 5)
    manifest = publish_tokens(store, "main", val_share=0.3)
    assert manifest.tokenizers["rgb"] | {"num_tokens": 5, "ordered": True} == (
        manifest.tokenizers["rgb"])
    spec = {each.name: each for each in modality_specs(manifest, max_text=12)}["tok_rgb@32"]
    assert (spec.max_tokens, spec.learned_positions) == (5, True)

    recipe = dataclasses.replace(
        TINY, training=dataclasses.replace(TINY.training, steps=1, batch_size=4))
    train_fourm(store, manifest, recipe, run="few")
    model = load_stored(store, "runs/few/model")
    tokenizer = load_tokenizer(store, manifest.tokenizers["rgb"]["path"], "fp32")
    text = TextTokenizer.from_bytes(store.read(f"{manifest.tokenizers['text']['path']}/{FILE}"))
    generator = Generator(model, {"rgb": tokenizer}, text)
    drawn = generator.generate({"caption": ["a square"]}, ["rgb"])["rgb"]
    assert drawn.tokens.shape == (1, 5)
    assert np.asarray(drawn.value).shape == (SIZE, SIZE, 3)
    assert Ledger(store).committed(chain.tokens["rgb"]) == set(range(SHARDS))
