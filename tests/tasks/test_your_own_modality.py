"""One file of a user's package adds a modality: labelled, tokenized, published, shown, unchanged
code. The file is the one of the tutorial, docs/your-own-modality.md."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infra.blocks import BlockReader
from infra.ledger import ShardData
from infra.ray_session import Embedded
from infra.runner import Resources, run_stages
from infra.shards import TarIndex, sample_key, write_tar
from infra.store import Store
from models import modalities
from models.labelers import kinds, preset
from pipelines.params import IngestOptions, LabelOptions, TokenizeOptions, TokenizerOptions
from tasks.chain import Chain, remember, remember_tokenizers
from tasks.checks import check
from tasks.fetch import make_plan
from tasks.label import label_jobs
from tasks.publish import publish_tokens
from tasks.tokenize import token_jobs
from tasks.tokenizer_recipes import tokenizer_recipe
from tasks.train_tokenizers import train_tokenizers
from tokenizers_vq.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TUTORIAL = ROOT / "docs" / "your-own-modality.md"
ROWS, SHARDS, HERE = 6, 2, Resources(workers=0)
SMALL = {"patch": 8, "width": 32, "steps": 40, "batch_size": 4}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An installed package that holds the tutorial's one file; its name."""
    torch.set_num_threads(1)
    site = tmp_path / "site"
    site.mkdir()
    (code,) = re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)
    (entry,) = re.findall(r"```toml\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)
    assert 'fourm.modalities"' in entry
    (name, module), = re.findall(r'^(\w+) = "(\w+):MODALITY"', entry, re.MULTILINE)
    (site / f"{module}.py").write_text(code)
    info = site / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[fourm.modalities]\n{name} = {module}:MODALITY\n")
    monkeypatch.syspath_prepend(str(site))
    modalities._catalogue.cache_clear()
    yield name
    monkeypatch.undo()
    modalities._catalogue.cache_clear()


def picture(number: int) -> bytes:
    """A bright square somewhere on a dark wall."""
    image = np.full((32, 48, 3), 20 + number, np.uint8)
    image[8:20, 4 + 3 * number : 16 + 3 * number] = 250, 60, 40
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def ingested(folder: Path) -> Store:
    source = folder / "list.tsv"
    source.write_text("".join(f"http://a.org/{i}.png\ttext {i}\n" for i in range(ROWS * SHARDS)))
    store = Store(str(folder / "data"))
    make_plan(store, str(source), shard_rows=ROWS)
    remember(store, "ingest", IngestOptions(source=str(source)).model_dump())
    chain = Chain(store)
    for shard in range(SHARDS):
        keys = [sample_key(shard, row) for row in range(ROWS)]
        outputs = {
            "rgb": write_tar((f"{key}.jpg", picture(row)) for row, key in enumerate(keys)),
            "caption": write_tar((f"{key}.txt", b"a square") for key in keys),
        }
        data = ShardData(keys, outputs, [(key, "ok", "") for key in keys], 1.0)
        chain.ledger.commit(chain.fetch, shard, data)
    return store


def test_a_modality_of_one_file_goes_through_labelling_tokenizing_and_publishing(
    package: str, tmp_path: Path
) -> None:
    store = ingested(tmp_path)
    assert package in kinds()
    assert package in LabelOptions.model_json_schema()["properties"]["labelers"]["items"]["enum"]
    for name in ("modern", "scenes", "released"):
        assert preset(name)[package].outputs == (package,)

    labels = LabelOptions(labelers=[package, "canny_edge"], device="cpu").model_dump()
    check("label", {**labels, "root": store.url})
    remember(store, "label", labels)
    chain = Chain(store)
    jobs = label_jobs(chain.labelers.values(), chain.fetch, range(SHARDS))
    reports = run_stages(store, jobs, target=Embedded(), resources=HERE)
    assert [report.done for report in reports.values()] == [SHARDS, SHARDS]
    path, sha256 = chain.ledger.open_output(chain.sources[package], 0, package)
    index = TarIndex(path, sha256=sha256)
    modality = modalities.get(package)
    mask = modality.decode(index.read(index.keys[1]))
    assert mask.shape == (32, 48)
    assert mask[10:18, 9:17].all()
    assert not mask[:6].any()
    assert modality.render(mask).shape == (32, 48, 3)

    learned = TokenizerOptions(modalities=[package], size=32, coordinate_bins=32)
    choices = {**learned.model_dump(), "max_samples": 40, "changes": {package: SMALL}}
    check("train_tokenizers", {**choices, "root": store.url})
    remember_tokenizers(store, choices)
    chain = Chain(store)
    infos = train_tokenizers(
        store, chain.sources, chain.recipes, shards=chain.tokenizer_shards, text=chain.text_recipe
    )
    assert infos[package].metrics["miou"] > 0.3

    remember(store, "tokenize", TokenizeOptions(crops=2).model_dump())
    chain = Chain(store)
    run_stages(
        store, token_jobs(chain.tokens.values(), chain.labelled(), device="cpu"),
        target=Embedded(), resources=HERE,
    )  # fmt: skip
    stage = chain.tokens[package]
    path, _ = chain.ledger.open_output(stage, 0, f"tok_{package}")
    tokens, valid = BlockReader(path).fixed("crop0")
    assert tokens.shape == (ROWS, 16)
    assert valid.all()
    back = load_tokenizer(store, infos[package].path, "fp32").decode_tokens(tokens[:1])
    assert modality.render(back[0]).shape == (32, 32, 3)

    manifest = publish_tokens(store, "main", val_share=0.5)
    assert f"tok_{package}" in manifest.modalities


def test_every_feature_map_of_the_catalogue_can_be_tokenized() -> None:
    for name in ("clip", "dinov2", "imagebind"):
        assert tokenizer_recipe(name, width=64).kind == "feature"
        assert tokenizer_recipe(name, width=64).width == 64


def test_without_the_package_its_modality_is_unknown() -> None:
    with pytest.raises(ValueError, match="no such labeler; there are 'depth'"):
        LabelOptions(labelers=["saliency"])
    with pytest.raises(ValueError, match="no such modality; there are 'rgb'"):
        TokenizerOptions(modalities=["saliency"])


def test_a_labeler_that_cannot_be_imported_or_is_none_is_named(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    from models.labelers import labeler_class

    own = modalities.get(package)
    for where, sentence in (
        ("no_such_module:A", "cannot import 'no_such_module:A'"),
        ("json:loads", "'json:loads' is no subclass of Labeler"),
    ):
        changed = dataclasses.replace(own, labeler=where)
        monkeypatch.setitem(modalities._catalogue(), package, changed)
        with pytest.raises(ValueError, match=sentence):
            labeler_class(package)
