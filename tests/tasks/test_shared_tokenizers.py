"""Two datasets with the same tokenizers: one trains them, the other takes them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from infra.store import Store
from pipelines.params import IngestOptions, LabelOptions, TokenizeOptions, TokenizerOptions
from tasks.chain import Chain, remember
from tasks.checks import check
from tasks.fetch import make_plan
from tasks.shared_tokenizers import take_tokenizers
from tasks.train_tokenizers import INFO, TEXT, TokenizerInfo, text_path, tokenizer_path


def dataset(folder: Path, name: str, labelers: list[str]) -> Store:
    source = folder / f"{name}.tsv"
    source.write_text(f"http://example.org/{name}.jpg\tpicture\n")
    store = Store(str(folder / name))
    make_plan(store, str(source), shard_rows=1)
    remember(store, "ingest", IngestOptions(source=str(source)).model_dump())
    remember(store, "label", LabelOptions(labelers=labelers, preset="scenes").model_dump())
    remember(store, "tokenize", TokenizeOptions().model_dump())
    return store


@pytest.fixture
def theirs(tmp_path: Path) -> Store:
    """A dataset with depth, boxes and normals, and a tokenizer of each."""
    store = dataset(tmp_path, "theirs", ["depth", "normal", "det"])
    choices = TokenizerOptions(modalities=["rgb", "depth", "normal"], size=128,
                               changes={"normal": {"steps": 7}}).model_dump()  # fmt: skip
    remember(store, "tokenizers", {**choices, "max_samples": 100, "shards": [0]})
    chain = Chain(store)
    paths = {name: tokenizer_path(name, recipe, [chain.sources[name]], [0])
             for name, recipe in chain.recipes.items()}  # fmt: skip
    paths[TEXT] = text_path(chain.sources, chain.text_recipe, [0])
    for name, path in paths.items():
        info = TokenizerInfo(name, path, f"sha of {name}", 1000, 64, {}, 1.0, patch=16)
        store.write(f"{path}/model.safetensors", name.encode())
        store.write(f"{path}/sheet.jpg", b"a picture of theirs")
        store.write_json(f"{path}/{INFO}", asdict(info))
    return store


def test_a_dataset_tokenizes_with_the_tokenizers_of_another_what_both_have_labels_of(
    theirs: Store, tmp_path: Path
) -> None:
    ours = dataset(tmp_path, "ours", ["depth", "clip", "det"])
    choices = TokenizerOptions(like=theirs.url).model_dump()
    check("train_tokenizers", {"root": ours.url, **choices})
    found = take_tokenizers(ours, theirs.url)
    assert set(found) == {"rgb", "depth", TEXT}
    assert take_tokenizers(ours, theirs.url) == found
    chain, other = Chain(ours), Chain(theirs)
    assert chain.tokenizers == {name: other.tokenizers[name] for name in found}
    assert set(chain.tokens) == {"rgb", "depth", "caption", "det"}
    for name, stage in chain.tokens.items():
        assert stage.revision == other.tokens[name].revision
    assert ours.read(f"{found['depth'].path}/model.safetensors") == b"depth"
    assert not any(path.endswith(".jpg") for path in ours.list("tokenizers/"))


def test_what_only_this_dataset_tells_as_text_stays_out(theirs: Store, tmp_path: Path) -> None:
    ours = dataset(tmp_path, "ours", ["depth", "metadata"])
    take_tokenizers(ours, theirs.url)
    assert set(Chain(ours).tokens) == {"rgb", "depth", "caption"}


def test_tokenizers_are_taken_of_another_dataset_that_has_them_and_lie_on_nothing_else(
    theirs: Store, tmp_path: Path
) -> None:
    def refused(store: Store, like: Store, why: str) -> None:
        choices = TokenizerOptions(like=like.url).model_dump()
        with pytest.raises(ValueError, match=why):
            check("train_tokenizers", {"root": store.url, **choices})

    ours = dataset(tmp_path, "ours", ["depth"])
    refused(theirs, theirs, "is this dataset itself")
    refused(ours, dataset(tmp_path, "third", ["depth"]), "run `fourm train-tokenizers`")
    path = Chain(theirs).tokenizers["depth"].path
    ours.write(f"{path}/model.safetensors", b"something else")
    with pytest.raises(ValueError, match="is another one than"):
        take_tokenizers(ours, theirs.url)
    assert "tokenizers" not in Chain(ours).settings
