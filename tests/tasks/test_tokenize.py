"""Tokenizers from labels to token shards: trained once, found again, aligned crops, holes kept."""

import io
import json
from contextlib import nullcontext
from threading import current_thread

import numpy as np
import pytest
import torch
from PIL import Image

from infra import ui
from infra.blocks import BlockReader
from infra.ledger import Ledger, ShardData, Stage
from infra.ray_session import Embedded, Existing
from infra.shards import hole, sample_key, write_tar
from infra.store import Store
from models import modalities
from models.crops import CropPolicy, crop_box
from tasks.run_store import read_curve
from tasks.tokenize import build_work, token_jobs, token_stage, tokenizer_infos
from tasks.tokenizer_config import TextRecipe
from tasks.tokenizer_health import histogram_picture, show_health
from tasks.tokenizer_recipes import tokenizer_recipe
from tasks.train_tokenizers import TEXT, train_tokenizers
from tokenizers_vq.sequences import string_to_det
from tokenizers_vq.text import FILE, TextTokenizer
from tokenizers_vq.tokenizer import load_tokenizer

torch.set_num_threads(1)
SIZE, ROWS, SHARDS, HOLE = 32, 6, 2, 2
POLICY = CropPolicy(num_crops=3, size=SIZE)
SMALL = {"size": SIZE, "patch": 8, "width": 32, "steps": 3, "batch_size": 4, "max_samples": 20}


def _value(name: str, rng: np.random.Generator):
    match name:
        case "rgb":
            return rng.integers(0, 256, (SIZE, SIZE * 2, 3), dtype=np.uint8)
        case "depth":
            return rng.uniform(0.1, 1, (SIZE, SIZE * 2)).astype(np.float32)
        case "semseg":
            return rng.integers(0, 4, (SIZE, SIZE * 2), dtype=np.uint8)
        case "clip":
            return rng.normal(size=(4, 4, 5)).astype(np.float16)
        case "caption":
            return "a red cube left of a blue sphere"
    box = [0.3, 0.3, 0.6, 0.7]
    return {"instances": [{"box": box, "class_name": "cube", "score": 0.9}]}


def _commit(ledger: Ledger, stage: Stage, shard: int) -> None:
    keys = [sample_key(shard, row) for row in range(ROWS)]
    outputs = {}
    for name in stage.outputs:
        rng = np.random.default_rng(shard)
        members = []
        for row, key in enumerate(keys):
            data = modalities.get(name).encode(_value(name, rng))
            missing = row == HOLE and stage.name == "label:depth"
            ext = modalities.get(name).ext
            members.append(hole(key, "out of memory") if missing else (f"{key}.{ext}", data))
        outputs[name] = write_tar(members)
    statuses = [(key, "ok", "") for key in keys]
    ledger.commit(stage, shard, ShardData(keys, outputs, statuses, 1.0))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    store = Store(str(tmp_path_factory.mktemp("set")))
    fetch = Stage("fetch", 1, {}, ("rgb", "caption"))
    stages = {"rgb": fetch, "caption": fetch}
    for name in ("depth", "semseg", "clip", "det"):
        stages[name] = Stage(f"label:{name}", 1, {}, (name,), (fetch,))
    for stage in dict.fromkeys(stages.values()):
        for shard in range(SHARDS):
            _commit(Ledger(store), stage, shard)
    recipes = {n: tokenizer_recipe(n, **SMALL) for n in ("rgb", "depth", "semseg", "clip")}
    infos = train_tokenizers(
        store, stages, recipes, shards=range(SHARDS), text=TextRecipe(bins=32)
    )
    return store, stages, recipes, infos


def _tokens(dataset, name: str, shard: int = 0) -> tuple[BlockReader, Stage]:
    store, stages, _, infos = dataset
    info = infos[TEXT if name in ("caption", "det") else name]
    stage = token_stage(name, info, POLICY, stages[name])
    (job,) = token_jobs([stage], [shard], precision="fp32")
    data = build_work(store.url, job.stage, job.config).run(shard)
    commit = Ledger(store).commit(stage, shard, data)
    assert commit.waited.keys() == {"input", "output"}
    path = commit.outputs[stage.outputs[0]]["path"]
    return BlockReader(store.local(path)), stage


def test_trained_tokenizers_state_quality_and_code_usage(dataset):
    store, _, _, infos = dataset
    assert infos["depth"].metrics.keys() >= {"abs_rel", "delta1", "usage", "perplexity"}
    assert infos["rgb"].metrics.keys() >= {"psnr"}
    assert infos["semseg"].metrics.keys() >= {"miou"}
    assert infos["clip"].metrics.keys() >= {"cosine"}
    assert infos[TEXT].metrics == {"bins": 32, "classes": 1}
    assert tokenizer_infos(store, {n: i.path for n, i in infos.items()}) == infos


def test_health_is_kept_as_json_as_pictures_and_in_the_curve(dataset):
    store, _, _, infos = dataset
    for name in ("rgb", "depth", "clip"):
        health = store.read_json(f"{infos[name].path}/health.json")
        assert health["metrics"] == infos[name].metrics
        assert len(health["histogram"]) == infos[name].vocab_size
        assert sum(health["histogram"]) % infos[name].num_tokens == 0
        curve = read_curve(store, f"runs/{infos[name].path}")
        assert curve[-1].items() >= health["metrics"].items()
        assert any(point.keys() >= {"reconstruction", "bottleneck"} for point in curve)
        with Image.open(io.BytesIO(store.read(f"{infos[name].path}/sheet.jpg"))) as sheet:
            assert sheet.height > 3 * SIZE
        events = store.list(f"runs/{infos[name].path}/tensorboard")
        assert any(b"health/codes" in store.read(file) for file in events)
    assert infos["rgb"].metrics.keys() >= {"psnr", "ssim"}


def test_the_artifact_of_a_tokenizer_shows_figures_and_pictures_below_300_kb(dataset):
    store, _, _, infos = dataset
    sent = []
    with ui.relayed(lambda what, arguments: sent.append((what, arguments))):
        show_health(store, "rgb", infos["rgb"].path)
    ((what, artifact),) = sent
    assert (what, artifact["key"]) == ("markdown", "tokenizer-rgb")
    assert all(f"| {name} |" in artifact["text"] for name in ("psnr", "ssim", "usage"))
    assert "data:image/jpeg;base64," in artifact["text"]
    assert len(artifact["text"]) <= 300_000


def test_the_histogram_ranks_codes_and_marks_unused_ones():
    picture = histogram_picture(np.array([0, 9, 1, 0]), 8)
    blue, red = np.array([60, 110, 190]), np.array([200, 40, 40])
    heights = (picture == blue).all(2).sum(0)
    assert heights[0] == heights[1] > heights[2] == heights[3] > 0 == heights[4:].sum()
    assert (picture[0, 4:] == red).all()
    assert not (picture[0, :4] == red).all(1).any()


def test_a_rerun_finds_every_tokenizer_and_trains_nothing(dataset, monkeypatch):
    store, stages, recipes, infos = dataset
    monkeypatch.setattr("tasks.train_tokenizers.Trainer", None)
    again = train_tokenizers(store, stages, recipes, shards=range(SHARDS), text=TextRecipe(bins=32))
    assert again == infos


def test_a_changed_recipe_gets_its_own_folder(dataset):
    store, stages, _, infos = dataset
    recipe = {"depth": tokenizer_recipe("depth", **{**SMALL, "steps": 2})}
    other = train_tokenizers(store, stages, recipe, shards=range(SHARDS))
    assert other["depth"].path != infos["depth"].path
    assert store.exists(f"{infos['depth'].path}/info.json")


@pytest.mark.slow
def test_trained_on_ray_two_at_a_time(dataset, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    store, stages, _, _ = dataset
    recipes = {n: tokenizer_recipe(n, **{**SMALL, "seed": 1}) for n in ("depth", "clip")}
    infos = train_tokenizers(store, stages, recipes, shards=range(SHARDS), workers=2)
    assert infos.keys() == recipes.keys()
    assert all(store.exists(f"{info.path}/info.json") for info in infos.values())


def test_tokenizers_that_occupy_gpus_are_refused_where_ray_never_has_any(dataset):
    store, stages, _, _ = dataset
    recipes = {"depth": tokenizer_recipe("depth", **{**SMALL, "seed": 2})}
    with pytest.raises(ValueError, match=r"tokenizer occupies 0\.5 GPU and Ray has 0: lower gpus"):
        train_tokenizers(store, stages, recipes, shards=range(SHARDS), workers=1, gpus=0.5,
                         target=Embedded(num_gpus=0))


def test_tokenizers_on_a_cluster_that_may_grow_ask_it_for_their_gpus(dataset, monkeypatch):
    import ray

    from tasks import train_tokenizers as module

    def remote(**options):
        raise KeyError(options["num_gpus"])

    monkeypatch.setattr(module, "ray_session", nullcontext)
    monkeypatch.setattr(ray, "remote", remote)
    store, stages, _, _ = dataset
    recipes = {"depth": tokenizer_recipe("depth", **{**SMALL, "seed": 2})}
    with pytest.raises(KeyError, match=r"0\.5"):
        train_tokenizers(store, stages, recipes, shards=range(SHARDS), workers=1, gpus=0.5,
                         target=Existing())  # fmt: skip


def test_no_labels_and_unknown_modalities_are_refused_before_any_work(dataset):
    store, stages, recipes, infos = dataset
    with pytest.raises(ValueError, match="no labels for 'normal'"):
        train_tokenizers(store, stages, {"normal": recipes["depth"]}, shards=[0])
    with pytest.raises(ValueError, match="choose from rgb, depth"):
        tokenizer_recipe("caption")
    with pytest.raises(ValueError, match="needs the depth tokenizer"):
        token_stage("depth", infos["rgb"], POLICY, stages["depth"])


def test_ordered_tokens_are_stored_as_few_as_asked_for(dataset):
    store, stages, _, _ = dataset
    recipe = {"depth": tokenizer_recipe("depth", **SMALL, registers=8)}
    info = train_tokenizers(store, stages, recipe, shards=range(SHARDS))["depth"]
    assert (info.num_tokens, info.ordered, info.length(SIZE)) == (8, True, 8)
    assert info.metrics.keys() >= {"abs_rel", "abs_rel@1", "abs_rel@4"}
    whole, few = (token_stage("depth", info, POLICY, stages["depth"], kept=k) for k in (0, 3))
    assert whole.fingerprint != few.fingerprint
    tokens = []
    for stage in (whole, few):
        data = build_work(store.url, stage, {"precision": "fp32"}).run(0)
        tokens.append(BlockReader.from_bytes(data.outputs["tok_depth"], "").fixed("crop1"))
    assert tokens[1][0].shape == (ROWS, 3)
    assert (tokens[0][0][:, :3] == tokens[1][0]).all()
    assert (tokens[0][1] == tokens[1][1]).all()
    with pytest.raises(ValueError, match="depth: 9 tokens of the 1 to 8 there are"):
        token_stage("depth", info, POLICY, stages["depth"], kept=9)


def test_few_tokens_of_a_grid_are_refused(dataset):
    _, stages, _, infos = dataset
    with pytest.raises(ValueError, match="the first 4 of 16 tokens on a grid do not decode"):
        token_stage("depth", infos["depth"], POLICY, stages["depth"], kept=4)


def test_pictures_twice_as_large_have_four_times_the_tokens(dataset):
    store, stages, _, infos = dataset
    policy = CropPolicy(num_crops=1, size=2 * SIZE)
    assert infos["rgb"].length(policy.size) == 4 * infos["rgb"].num_tokens
    assert infos["clip"].length(policy.size) == infos["clip"].num_tokens
    stage = token_stage("rgb", infos["rgb"], policy, stages["rgb"])
    data = build_work(store.url, stage, {"precision": "fp32"}).run(0)
    tokens, valid = BlockReader.from_bytes(data.outputs["tok_rgb"], "").fixed("crop0")
    assert tokens.shape == (ROWS, 64)
    assert valid.all()
    back = load_tokenizer(store, infos["rgb"].path, "fp32").decode_tokens(tokens[:1])
    assert back[0].shape == (2 * SIZE, 2 * SIZE, 3)


@pytest.mark.parametrize("name", ["rgb", "depth", "semseg", "clip"])
def test_rows_hold_the_tokens_of_each_crop_and_holes_stay_holes(dataset, name):
    store, _, _, infos = dataset
    reader, stage = _tokens(dataset, name)
    assert reader.metadata["tokenizer_fingerprint"] == infos[name].fingerprint
    tokenizer = load_tokenizer(store, infos[name].path, "fp32")
    modality, rng = modalities.get(name), np.random.default_rng(0)
    truth = [modality.decode(modality.encode(_value(name, rng))) for _ in range(ROWS)]
    for crop in range(POLICY.num_crops):
        tokens, valid = reader.fixed(f"crop{crop}")
        assert valid.tolist() == [not (name == "depth" and row == HOLE) for row in range(ROWS)]
        box = crop_box(POLICY, reader.keys[4], crop, 2.0)
        expected = tokenizer.encode_values([modality.crop(truth[4], box, SIZE)])
        assert (tokens[4] == expected[0]).all()
    assert stage.outputs == (f"tok_{name}",)


def test_captions_are_equal_in_all_crops_and_boxes_move_with_them(dataset):
    store, _, _, infos = dataset
    text = TextTokenizer.from_bytes(store.read(f"{infos[TEXT].path}/{FILE}"))
    captions, _ = _tokens(dataset, "caption")
    assert text.decode(captions.ragged("crop2", 0)) == "a red cube left of a blue sphere"
    boxes, _ = _tokens(dataset, "det")
    window = crop_box(POLICY, boxes.keys[0], 1, 2.0)
    (instance,) = string_to_det(text.decode(boxes.ragged("crop1", 0)), bins=32)["instances"]
    assert instance["class_name"] == "cube"
    left = max(0.0, (0.3 - window.left) / window.width)
    assert instance["box"][0] == pytest.approx(left, abs=0.5 / 31 + 1e-6)


def test_tokens_made_twice_are_the_same_bytes(dataset):
    store, stages, _, infos = dataset
    stage = token_stage("rgb", infos["rgb"], POLICY, stages["rgb"])
    work = build_work(store.url, stage, {"precision": "fp32"})
    assert work.run(1).outputs == work.run(1).outputs


@pytest.mark.parametrize("name", ["depth", "det"])
def test_values_are_prepared_beside_the_network_unless_a_network_prepares_them(
    dataset, monkeypatch, name
):
    store, stages, _, infos = dataset
    stage = token_stage(name, infos[TEXT if name == "det" else name], POLICY, stages[name])
    (job,) = token_jobs([stage], [0], precision="fp32")
    work, outputs = build_work(store.url, job.stage, job.config), []
    encoder, prepare = work._encoder, work._encoder.prepare
    assert encoder.ahead  # of boxes no part is told in codes of a network
    for ahead in (True, False):
        threads = set[str]()
        monkeypatch.setattr(encoder, "ahead", ahead)
        monkeypatch.setattr(
            encoder, "prepare",
            lambda *given, seen=threads: seen.add(current_thread().name) or prepare(*given),
        )  # fmt: skip
        outputs.append(work.run(0).outputs)
        assert {name.startswith("lane") for name in threads} == {not ahead}
    assert outputs[0] == outputs[1]


def test_an_exchanged_tokenizer_is_noticed(dataset):
    store, stages, _, infos = dataset
    stage = token_stage("depth", infos["depth"], POLICY, stages["depth"])
    config = json.loads(store.read(f"{stage.model}/config.json"))
    original = store.read(f"{stage.model}/config.json")
    config["codec"]["near"] = 0.02
    store.write(f"{stage.model}/config.json", json.dumps(config).encode())
    try:
        with pytest.raises(ValueError, match="not the tokenizer of tokens:depth"):
            build_work(store.url, stage, {})
    finally:
        store.write(f"{stage.model}/config.json", original)


def test_little_memory_changes_no_token(dataset, monkeypatch):
    store, _, _, infos = dataset
    tokenizer = load_tokenizer(store, infos["depth"].path, "fp32")
    packed = tokenizer.pack(list(np.random.default_rng(0).random((5, SIZE, SIZE), np.float32)))
    whole, encode = tokenizer.encode_packed(packed), tokenizer.net.encode

    def greedy(batch):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("no memory")
        return encode(batch)

    monkeypatch.setattr(tokenizer.net, "encode", greedy)
    np.testing.assert_array_equal(tokenizer.encode_packed(packed), whole)
    assert tokenizer.batches.size == 2
