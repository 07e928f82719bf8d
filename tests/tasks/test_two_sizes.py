"""Token sets of two sizes in one dataset: the same regions of the same samples, from the form of
`tokenize` to super-resolution."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infra.blocks import BlockReader
from infra.manifest import load_manifest
from infra.store import Store
from infra.verify import verify
from models import modalities
from models.crops import crop_box
from models.fourm.masking import Component, Mixture
from pipelines.params import LabelOptions, TokenizeOptions
from tasks.chain import Chain, remember
from tasks.checks import check
from tasks.generate import How, generate
from tasks.interchange import build_work, export_set, finish_import, import_jobs
from tasks.publish import is_current, publish_tokens
from tasks.specs import chosen_specs, modality_specs
from tasks.tokenize import token_stage
from tasks.tokenizer_data import read_values
from tasks.train import FourMTask, train_fourm
from tests.tasks.test_token_choices import ROWS, SMALL, _ingested, _label, _tokenize
from tests.tasks.test_train import TINY
from tokenizers_vq.tokenizer import load_tokenizer

LOW, HIGH, TOKENS = 32, 64, 16
LEARNED = {"modalities": ["rgb", "clip"],
           "changes": {"rgb": {**SMALL, "patch": 8}, "clip": SMALL}}
EVEN = Component(inputs={"*": 1.0}, targets={"*": 1.0}, num_inputs=(8, 8), num_targets=(8, 8))
TRAINING = dataclasses.replace(TINY.training, steps=2, batch_size=4)
COARSE = dataclasses.replace(
    TINY, modalities=("caption", "rgb", "tok_rgb"), mixture=Mixture(components=(EVEN,)),
    training=TRAINING)
FINER = dataclasses.replace(
    COARSE, modalities=("caption", f"tok_rgb@{LOW}", f"tok_rgb@{HIGH}"),
    predicts=(f"tok_rgb@{HIGH}",), inherit={f"tok_rgb@{HIGH}": f"tok_rgb@{LOW}"}, start="coarse")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Chain, Chain]:
    """A dataset, its stages at one size, and at two; published."""
    store = _ingested(tmp_path_factory.mktemp("two"))
    _label(store, labelers=["clip"])
    before = _tokenize(store, LEARNED)
    publish_tokens(store, "main", val_share=0.3)
    after = _tokenize(store, LEARNED, sizes=[HIGH, LOW])
    assert not is_current(store, "main")
    publish_tokens(store, "main", val_share=0.3)
    return store, before, after


def _rows(chain: Chain, name: str, column: str = "crop1") -> np.ndarray:
    stage = chain.tokens[name]
    tokens, valid = BlockReader(chain.ledger.open_output(stage, 0, stage.outputs[0])[0]).fixed(
        column)
    assert valid.all()
    return tokens


def test_a_second_size_is_added_and_leaves_the_first_as_it_was(made):
    _, before, after = made
    assert list(before.tokens) == ["rgb", "clip", "caption"]
    assert list(after.tokens) == [*before.tokens, "rgb@64", "clip@64"]
    for name, stage in before.tokens.items():
        assert after.tokens[name].fingerprint == stage.fingerprint
    names = {stage.name for stage in after.tokens.values()}
    assert names == {"tokens:rgb", "tokens:clip", "tokens:caption", "tokens:rgb:64",
                     "tokens:clip:64"}


def test_pictures_of_both_sizes_show_the_same_regions(made):
    store, _, chain = made
    tokenizer = load_tokenizer(store, chain.tokenizers["rgb"].path, "fp32")
    crop = modalities.get("rgb").crop
    values = list(read_values(chain.ledger, chain.fetch, 0, "rgb"))
    for name, size, count in (("rgb", LOW, TOKENS), ("rgb@64", HIGH, 4 * TOKENS)):
        cut = [crop(value, crop_box(chain.crops, key, 1, value.shape[1] / value.shape[0]), size)
               for key, value in values]
        rows = _rows(chain, name)
        assert rows.shape == (ROWS, count)
        assert (rows == tokenizer.encode_values(cut)).all()


def test_features_of_the_finer_set_are_seen_in_a_larger_picture_and_not_stored(made):
    store, _, chain = made
    stage = chain.tokens["clip@64"].upstream[0]
    assert stage.params["options"] == {"scale": 2.0}
    assert chain.ledger.committed(stage) == set()
    assert _rows(chain, "clip@64").shape[1] == 4 * _rows(chain, "clip").shape[1]
    assert verify(store, deep=True).ok


def test_one_manifest_holds_both_and_a_name_without_size_means_the_sets_own(made):
    store, _, _ = made
    manifest = load_manifest(store, "main")
    assert list(manifest.modalities) == [
        "caption", "rgb", "tok_clip", "tok_clip@64", "tok_rgb", "tok_rgb@64"]
    assert is_current(store, "main")
    assert manifest.meta["crops"]["size"] == LOW
    entry = manifest.tokenizers["rgb"]
    assert manifest.tokenizers["rgb@64"] == entry | {"num_tokens": 4 * TOKENS}
    specs = modality_specs(manifest, max_text=12)
    assert {spec.name for spec in specs if "rgb" in spec.name} == {
        "rgb@32", "rgb@64", "tok_rgb@32", "tok_rgb@64"}
    task = FourMTask(store, manifest, dataclasses.replace(COARSE, modalities=()))
    assert set(task.config.by_name) == {"caption", "rgb@32", "tok_clip@32", "tok_rgb@32"}
    taken = chosen_specs(specs, ("rgb", "tok_rgb", "tok_clip@64"), (), "the set")
    assert {spec.name for spec in taken} == {"rgb@32", "tok_rgb@32", "tok_clip@64"}


def test_a_batch_holds_both_sizes_of_the_same_crops(made):
    store, _, chain = made
    both = dataclasses.replace(
        FINER, modalities=(*FINER.modalities, "rgb@32", "rgb@64"), inherit={}, start="")
    task = FourMTask(store, load_manifest(store, "main"), both)
    samples = task.data.parts[0].samples([(0, row, 0.5) for row in range(ROWS)])
    assert (samples.grids["tok_rgb@32"][...] == _rows(chain, "rgb")).all()
    assert (samples.grids["tok_rgb@64"][...] == _rows(chain, "rgb@64")).all()
    assert samples.pixels["rgb@64"].shape[1] == 4 * samples.pixels["rgb@32"].shape[1]


def test_super_resolution_trains_on_one_manifest_and_refines_what_a_coarse_run_draws(
    made, tmp_path: Path
):
    store, _, _ = made
    manifest = load_manifest(store, "main")
    train_fourm(store, manifest, COARSE, run="coarse")
    info = train_fourm(store, manifest, FINER, run="fine")
    assert [name for name in info.metrics if name.startswith("val/")] == [
        "val/caption->tok_rgb@64"]
    (file,) = generate(store, "coarse", {"caption": "a square"}, ["rgb"], tmp_path)
    assert Image.open(file).size == (LOW, LOW)
    (file,) = generate(
        store, "coarse", {"caption": "a square"}, ["rgb"], tmp_path, How(upscale="fine"))
    assert Image.open(file).size == (HIGH, HIGH)


def test_a_set_of_two_sizes_survives_export_and_import(made, tmp_path: Path):
    store, _, _ = made
    out, back = Store(str(tmp_path / "out")), Store(str(tmp_path / "back"))
    done = export_set(store, out, layout="ml-4m")
    assert {"tok_rgb", "tok_rgb@64"} <= set(done.parts)
    for job in import_jobs(back, out):
        work = build_work(back.url, job.stage, job.config)
        for shard in job.shards:
            Chain(back).ledger.commit(job.stage, shard, work.run(shard))
    found = finish_import(back, out)
    manifest = load_manifest(store, "main")
    assert found is not None
    assert found.modalities.keys() == manifest.modalities.keys()
    for name in ("tok_rgb", "tok_rgb@64", "tok_clip@64"):
        assert found.sha256(name, 0) == manifest.sha256(name, 0)


def test_a_size_that_cuts_a_token_in_two_is_refused_before_any_work(made):
    store, _, _ = made
    choices = TokenizeOptions(sizes=[LOW, 60]).model_dump()
    with pytest.raises(ValueError, match="60 is no multiple of the 8 px of a token of rgb"):
        check("tokenize", {**choices, "root": store.url})
    chain = made[2]
    with pytest.raises(ValueError, match="rgb: a side of 60 px is no multiple of the 8 px"):
        token_stage("rgb", chain.tokenizers["rgb"], chain.crops, chain.fetch, size=60)


def test_features_of_a_labeler_that_knows_no_sizes_stay_at_one(tmp_path: Path):
    store = _ingested(tmp_path)
    remember(store, "label", LabelOptions(preset="scenes", labelers=["depth"]).model_dump())
    remember(store, "tokenizers", {"modalities": ["rgb"], "preset": "scenes", "size": LOW,
                                   "changes": {}, "shards": [0]})
    remember(store, "tokenize", TokenizeOptions(sizes=[LOW, HIGH]).model_dump())
    assert Chain(store).in_passing == {}
