"""Every modality of the catalogue goes from labels to tokens, through a 4M, and back to a picture.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.blocks import BlockReader
from infra.manifest import load_manifest
from infra.ray_session import Embedded
from infra.runner import Resources, run_stages
from infra.store import Store
from models import modalities
from models.fourm.masking import Component, Mixture
from pipelines.params import TokenizeOptions, TokenizerOptions
from tasks.chain import Chain, remember, remember_tokenizers
from tasks.checks import check
from tasks.generate import generate, load_generator
from tasks.publish import publish_tokens
from tasks.recipes import TrainRecipe
from tasks.tokenize import token_jobs
from tasks.tokenizer_recipes import recipe_names
from tasks.train import train_fourm
from tasks.train_config import TrainConfig
from tasks.train_tokenizers import train_tokenizers
from tests.tasks.every_modality import LABELERS, make_labels, value_of

BINS = 64
TINY = {"width": 16, "encoder_depth": 1, "decoder_depth": 1, "steps": 2, "batch_size": 2}
ALL = Component(inputs={"*": 1.0}, targets={"*": 1.0}, num_inputs=(40, 40), num_targets=(40, 40))
RECIPE = TrainRecipe(
    network={"dim": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2},
    mixture=Mixture(components=(ALL,), per_batch=True),
    training=TrainConfig(steps=2, batch_size=4, lr=1e-3, warmup_steps=1, precision="fp32"),
    max_text=12, val_samples=2,
)  # fmt: skip


def choices() -> dict:
    """What is told to `train-tokenizers`: all learned modalities, each network tiny."""
    names = recipe_names()
    codes = {"sam_instance": {**TINY, "levels": [4, 4, 4, 4]}}
    options = TokenizerOptions(
        modalities=names, size=32, coordinate_bins=BINS, text_vocab=700,
        changes={name: codes.get(name, TINY) for name in names},
    )  # fmt: skip
    return {**options.model_dump(), "max_samples": 20}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Store:
    torch.set_num_threads(1)
    folder: Path = tmp_path_factory.mktemp("all")
    store = make_labels(str(folder / "data"), str(folder / "list.tsv"))
    check("train_tokenizers", {**choices(), "root": store.url})
    remember_tokenizers(store, choices())
    chain = Chain(store)
    train_tokenizers(
        store, chain.sources, chain.recipes, shards=chain.tokenizer_shards, text=chain.text_recipe
    )
    remember(store, "tokenize", TokenizeOptions(crops=2).model_dump())
    chain = Chain(store)
    jobs = token_jobs(chain.tokens.values(), chain.labelled(), device="cpu")
    run_stages(store, jobs, target=Embedded(), resources=Resources(workers=0))
    manifest = publish_tokens(store, "main", val_share=0.5)
    train_fourm(store, manifest, RECIPE, run="main")
    return store


def test_the_tiny_set_holds_all_modalities_of_the_project(trained: Store) -> None:
    names = set(Chain(trained).sources)
    assert names == set(modalities.names())
    assert len(LABELERS) == 14
    manifest = load_manifest(trained, "main")
    expected = {name if modalities.get(name).kind == "sequence" else f"tok_{name}"
                for name in names}  # fmt: skip
    assert set(manifest.modalities) == {"rgb", *expected}


def test_texts_of_the_token_set_read_back_as_the_labels(trained: Store) -> None:
    chain, generator = Chain(trained), load_generator(trained, "main")

    def told(name: str) -> object:
        path, _ = chain.ledger.open_output(chain.tokens[name], 0, name)
        return generator.read(name, generator.text.decode(BlockReader(path).ragged("crop0", 0)))

    assert told("caption") == value_of("caption", 0)
    metadata, label = told("metadata"), value_of("metadata", 0)
    assert metadata["original_width"] == label["original_width"]
    assert metadata["brightness"] == pytest.approx(label["brightness"], abs=255 / 49)
    ((number, colors),) = told("color_palette").items()
    step = 255 / (BINS - 1)
    assert np.abs(np.array(colors) - value_of("color_palette", 0)[number]).max() <= step
    (human,) = told("human_poses")["humans"]
    assert [point[2] for point in human["keypoints"]] == [1.0] * 17
    # The centre crop of 48 x 32 is the middle two thirds in x.
    want = np.array(value_of("human_poses", 0)["humans"][0]["keypoints"])[:, :2]
    want[:, 0] = (want[:, 0] - 1 / 6) * 1.5
    found = np.array(human["keypoints"])[:, :2]
    assert np.abs(found - want).max() <= 1 / (BINS - 1)
    boxes = [each["box"] for each in told("sam_instance")["instances"]]
    assert [0, 2, 32, 30] in boxes


def test_every_modality_is_generated_and_rendered(trained: Store, tmp_path: Path) -> None:
    generator = load_generator(trained, "main")
    assert set(generator.inputs) == set(modalities.names())
    assert set(generator.targets) == set(modalities.names()) - {"t5_caption"}
    given = {"caption": "a cube"}
    generate(trained, "main", given, generator.targets, tmp_path)
    for name in generator.targets:
        if name == "caption":
            assert (tmp_path / "caption.txt").exists()
            continue
        assert (tmp_path / f"{name}.png").stat().st_size > 0
        raw = {"rgb": "rgb.png", "det": "det.json"}
        ext = modalities.get(name).ext
        file = tmp_path / raw.get(name, f"{name}.value.{ext}")
        modalities.get(name).decode(file.read_bytes())


def test_every_modality_can_be_a_condition(trained: Store, tmp_path: Path) -> None:
    inputs = {}
    for name in sorted(set(modalities.names()) - {"caption"}):
        modality = modalities.get(name)
        path = tmp_path / f"{name}.{modality.ext}"
        path.write_bytes(modality.encode(value_of(name, 3)))
        inputs[name] = str(path)
    generate(trained, "main", {**inputs, "caption": "a cube"}, ["color_palette"], tmp_path / "out")
    (palette,) = json.loads((tmp_path / "out" / "color_palette.value.json").read_bytes())
    assert isinstance(palette, dict)


def test_tokenizing_takes_a_list_of_modalities(trained: Store) -> None:
    wanted = ["depth", "caption", "sam_instance"]
    few = TokenizeOptions(crops=2, modalities=wanted).model_dump()
    check("tokenize", {**few, "root": trained.url})
    every, chain = Chain(trained).tokens, Chain(trained)
    chain.settings["tokenize"] = few
    assert chain.tokens == {name: every[name] for name in every if name in wanted}
    odd = {**few, "root": trained.url, "modalities": ["smell"]}
    with pytest.raises(ValueError, match="no tokenizer of 'smell'; there are rgb"):
        check("tokenize", odd)


def test_a_text_that_its_vocabulary_cannot_hold_is_refused_before_work(trained: Store) -> None:
    few = {**choices(), "root": trained.url, "coordinate_bins": 16, "changes": {},
           "modalities": ["rgb", "depth"]}  # fmt: skip
    with pytest.raises(ValueError, match="metadata is written with at least 50 coordinate bins"):
        check("train_tokenizers", few)
    wide = {**choices(), "root": trained.url}
    wide["changes"] = {"sam_instance": {"levels": [4, 4, 4, 4, 4]}}
    with pytest.raises(ValueError, match="tell 256 codes of sam_instance apart"):
        check("train_tokenizers", wide)
