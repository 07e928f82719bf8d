"""A dataset remembers how it was made: the same choices give the same stages everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infra.ledger import ShardData
from infra.shards import sample_key, write_tar
from infra.store import Store
from pipelines.params import (
    IngestOptions,
    LabelOptions,
    LabelParams,
    TokenizeOptions,
    TokenizerOptions,
)
from tasks.chain import Chain, remember, remember_tokenizers
from tasks.checks import check
from tasks.choices import labelers
from tasks.fetch import make_plan

ROWS, SHARD = 6, 2


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three planned shards, and networks in a folder instead of the hub."""
    source = tmp_path / "list.tsv"
    source.write_text("".join(f"http://example.org/{i}.jpg\tpicture {i}\n" for i in range(ROWS)))
    network = tmp_path / "network"
    network.mkdir()
    (network / "config.json").write_text("{}")
    store = Store(str(tmp_path / "data"))
    make_plan(store, str(source), shard_rows=SHARD)
    remember(store, "ingest", IngestOptions(source=str(source)).model_dump())
    remember(store, "label", _label(network))
    return store


def _label(network: Path, **changes: Any) -> dict[str, Any]:
    options = {"labelers": ["depth"], "models": {"depth": str(network)}, **changes}
    return LabelOptions(**options).model_dump()


def _commit(chain: Chain, stage: Any, shard: int) -> None:
    keys = [sample_key(shard, row) for row in range(SHARD)]
    outputs = {name: write_tar((f"{key}.txt", b"x") for key in keys) for name in stage.outputs}
    chain.ledger.commit(stage, shard, ShardData(keys, outputs, [(k, "ok", "") for k in keys], 1.0))


def test_a_second_reader_finds_the_same_stages(store: Store) -> None:
    first, second = Chain(store), Chain(Store(store.url))
    assert first.fetch.id == second.fetch.id
    assert first.labels["depth"].fingerprint == second.labels["depth"].fingerprint
    assert first.labels["depth"].upstream == (first.fetch,)


def test_what_does_not_change_the_bytes_does_not_change_the_stage(
    store: Store, tmp_path: Path
) -> None:
    before = Chain(store).labels["depth"]
    ingest = Chain(store).section("ingest") | {"timeout": 99.0, "concurrency": 2}
    remember(store, "label", _label(tmp_path / "network", batch_size=3, device="cpu"))
    remember(store, "ingest", ingest)
    assert Chain(store).labels["depth"].id == before.id


def test_a_flow_that_is_told_otherwise_than_before_says_so(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    ingest = Chain(store).section("ingest")
    remember(store, "ingest", ingest | {"source": "longer.tsv", "timeout": 3.0})
    assert not caplog.records
    remember(store, "ingest", ingest | {"image_size": 512})
    assert "image_size was 256, is 512. What that changes is made anew" in caplog.text


def test_another_network_changes_only_its_branch(store: Store, tmp_path: Path) -> None:
    fetch, label = Chain(store).fetch, Chain(store).labels["depth"]
    (tmp_path / "network" / "config.json").write_text('{"new": 1}')
    assert Chain(store).fetch.id == fetch.id
    assert Chain(store).labels["depth"].id != label.id


def test_weights_in_a_folder_label_alike_wherever_it_lies(store: Store, tmp_path: Path) -> None:
    before = Chain(store).labels["depth"]
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "network").rename(tmp_path / "elsewhere" / "network")
    remember(store, "label", _label(moved))
    assert Chain(store).labels["depth"].id == before.id
    assert before.model == "network"


def test_a_labelers_caption_goes_before_the_lists(store: Store, tmp_path: Path) -> None:
    assert Chain(store).sources["caption"].name == "fetch"
    network = str(tmp_path / "network")
    choices = _label(tmp_path / "network", labelers=["caption"], models={"caption": network})
    remember(store, "label", choices)
    assert Chain(store).sources["caption"].name == "label:caption"


def test_tokenizers_learn_from_the_shards_of_the_first_time(store: Store) -> None:
    chain = Chain(store)
    choices = TokenizerOptions(modalities=["rgb", "depth"], max_shards=2).model_dump()
    with pytest.raises(ValueError, match="run `fourm label` first"):
        remember_tokenizers(store, choices)
    for shard in (1, 2):
        _commit(chain, chain.fetch, shard)
        _commit(chain, chain.labels["depth"], shard)
    remember_tokenizers(store, choices)
    assert Chain(store).tokenizer_shards == [1, 2]
    _commit(chain, chain.fetch, 0)
    _commit(chain, chain.labels["depth"], 0)
    remember_tokenizers(store, choices)
    assert Chain(store).tokenizer_shards == [1, 2]
    remember_tokenizers(store, {**choices, "max_shards": 1})
    assert Chain(store).tokenizer_shards == [0]


def test_what_other_software_or_options_made_is_named_and_not_passed_over(store: Store) -> None:
    chain = Chain(store)
    label = {**LabelParams(root=store.url).model_dump(), **chain.section("label")}
    with pytest.raises(ValueError, match="has its pictures; run `fourm ingest` first"):
        check("label", label)
    for shard in range(2):
        _commit(chain, chain.fetch, shard)
    check("label", label)
    remember(store, "ingest", {**chain.section("ingest"), "image_size": 99})
    now = Chain(store).fetch.id
    made = rf"shards 2 of {chain.fetch.id} \(made by .* do not count as {now}"
    for flow in (lambda: check("label", label), Chain(store).learnable):
        with pytest.raises(ValueError, match=made):
            flow()


def test_of_two_runs_at_once_the_shards_of_the_first_stay(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, replace = Chain(store), Store.replace
    choices = TokenizerOptions(modalities=["rgb", "depth"], max_shards=2).model_dump()
    for shard in range(2):
        _commit(chain, chain.fetch, shard)
        _commit(chain, chain.labels["depth"], shard)
    section = {**choices, "size": 128, "max_samples": 4000, "shards": [1]}

    def after_another(self: Store, path: str, data: bytes, expected: str | None) -> None:
        monkeypatch.setattr(Store, "replace", replace)
        remember(store, "tokenizers", section)
        replace(self, path, data, expected)

    monkeypatch.setattr(Store, "replace", after_another)
    remember_tokenizers(store, choices)
    assert Chain(store).tokenizer_shards == [1]


def test_untrained_tokenizers_are_named(store: Store) -> None:
    chain = Chain(store)
    _commit(chain, chain.fetch, 0)
    _commit(chain, chain.labels["depth"], 0)
    remember_tokenizers(store, TokenizerOptions(modalities=["depth"]).model_dump())
    remember(store, "tokenize", TokenizeOptions().model_dump())
    with pytest.raises(ValueError, match="run `fourm train-tokenizers`"):
        _ = Chain(store).tokens


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"models": {"det": "x"}}, "models names 'det'; the labelers are depth"),
        ({"preset": "none"}, "no labeler preset 'none'; there are"),
        ({"resources": {"det": {"batch_size": 2}}}, "resources names 'det'; the labelers are"),
    ],
)
def test_impossible_labels_are_refused(changes: dict[str, Any], sentence: str) -> None:
    choices = {**LabelOptions(labelers=["depth"]).model_dump(), **changes}
    with pytest.raises(ValueError, match=sentence):
        labelers(choices)


def _resources(**own: dict[str, Any]) -> dict[str, Any]:
    return LabelParams(resources=own).model_dump()["resources"]


def test_resources_of_a_labeler_change_its_batches_and_no_stage(
    store: Store, tmp_path: Path
) -> None:
    before = Chain(store).labels["depth"].id
    own = _resources(depth={"gpus": 0.25, "batch_size": 5, "compile": True})
    remember(store, "label", _label(tmp_path / "network", resources=own))
    found = Chain(store).labelers["depth"]
    assert (found.batch_size, found.compile) == (5, True)
    assert Chain(store).labels["depth"].id == before


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"models": {"det": "./nosuch"}}, r"there is no folder '\./nosuch' for 'det'"),
        ({"share": ["semseg+nose"]}, r"share='semseg\+nose': no labeler 'nose'"),
        (
            {"share": ["semseg+det"], "resources": _resources(det={"gpus": 0.5})},
            "'det' has other resources than 'semseg'",
        ),
        (
            {"resources": _resources(det={"accelerator": "A100"})},
            "resources of 'det': an accelerator, but no gpus",
        ),
        (
            {"labelers": ["canny_edge"], "resources": _resources(canny_edge={"compile": True})},
            "resources of 'canny_edge': it has no network that can be compiled",
        ),
    ],
)
def test_check_refuses_labelers_that_cannot_run_as_asked(
    store: Store, changes: dict[str, Any], sentence: str
) -> None:
    form = LabelParams(root=store.url, preset="scenes", labelers=["semseg", "det"])
    with pytest.raises(ValueError, match=sentence):
        check("label", {**form.model_dump(), **changes})


def test_check_looks_for_a_compiler_on_this_machine_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.cpp_builder as builder

    chain = Chain(store)
    _commit(chain, chain.fetch, 0)

    def missing() -> str:
        raise RuntimeError("no g++")

    monkeypatch.setattr(builder, "get_cpp_compiler", missing)
    form = LabelParams(
        root=store.url, preset="scenes", labelers=["det"], resources={"det": {"compile": True}}
    )
    with pytest.raises(ValueError, match="no compiler for cpu"):
        check("label", form.model_dump())
    elsewhere = LabelParams(**{**form.model_dump(), "ray": {"kind": "existing"}})
    check("label", elsewhere.model_dump())


def test_check_refuses_a_tokenizer_without_labels(store: Store) -> None:
    choices = TokenizerOptions(modalities=["normal"]).model_dump()
    with pytest.raises(ValueError, match=r"no labels for 'normal'; there are rgb, caption, depth"):
        check("train_tokenizers", {"root": store.url, **choices})


def test_a_run_whose_choices_another_has_replaced_meanwhile_does_not_go_on_with_those(
    store: Store, tmp_path: Path
) -> None:
    from pipelines.ingest import fetch_rows
    from pipelines.label import label_pictures
    from pipelines.params import IngestParams, TokenizeParams
    from pipelines.tokenize import tokenize_labels

    source = str(tmp_path / "list.tsv")
    remember(store, "tokenize", TokenizeOptions(crops=2).model_dump())
    for stage, params in (
        (fetch_rows, IngestParams(root=store.url, workers=0, source=source, image_size=64)),
        (label_pictures, LabelParams(root=store.url, workers=0, labelers=["normal"])),
        (tokenize_labels, TokenizeParams(root=store.url, workers=0, crops=3)),
    ):
        with pytest.raises(ValueError, match="another run has chosen otherwise"):
            stage.fn(params)
