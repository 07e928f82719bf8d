"""Layouts of others: what goes out comes back to the same bytes, and other tools can read it."""

from __future__ import annotations

import io
import json
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.blocks import BlockReader, BlockWriter, Column
from infra.ledger import Ledger, ShardData, Stage
from infra.manifest import load_manifest, publish
from infra.shards import TornShard, hole, read_tar, sample_key, write_tar
from infra.store import Store
from models import modalities
from models.crops import CropPolicy, crop_box
from tasks.chain import remember
from tasks.interchange import build_work, export_set, finish_import, import_jobs
from tasks.layouts import LAYOUTS, Part, npy, read_shard
from tasks.specs import modality_specs

SHARDS, ROWS, CROPS, HOLE = (0, 2), 5, 3, 3
POLICY = {"num_crops": CROPS, "min_scale": 0.8, "hflip": True, "size": 32}
LABELS = Stage("fetch", 1, {}, ("rgb", "caption", "det", "depth"))
DENSE = Stage("tokens:rgb", 1, {}, ("tok_rgb",))
TEXT = Stage("tokens:caption", 1, {}, ("caption",))


def label(name: str, rng: np.random.Generator) -> bytes:
    modality = modalities.get(name)
    if name == "rgb":
        buffer = io.BytesIO()
        noise = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(buffer, "JPEG")
        return buffer.getvalue()
    if name == "depth":
        return modality.encode(rng.uniform(0, 1, (48, 64)).astype(np.float32))
    if name == "det":
        box = {"box": rng.uniform(0, 1, 4).tolist(), "class_name": "cube", "score": 0.5}
        return modality.encode({"instances": [box]})
    return modality.encode(f"a cube, number {rng.integers(100)}")


def tokens(length: int | None, keys: list[str], missing: int) -> bytes:
    rng = np.random.default_rng(length or 0)
    columns = {f"crop{i}": Column("uint16", length) for i in range(CROPS)}
    writer = BlockWriter(columns, {"modality": "x", "vocab_size": "30000", "tokenizer": "t"})
    for row, key in enumerate(keys):
        sizes = [length or int(rng.integers(0, 9)) for _ in columns]
        crops = [rng.integers(0, 30_000, size).astype(np.uint16) for size in sizes]
        value = dict.fromkeys(columns) if row == missing else dict(zip(columns, crops, strict=True))
        writer.add(key, value)
    return writer.finish()


def commit(store: Store, stage: Stage, shard: int, outputs: dict[str, bytes]) -> None:
    keys = [sample_key(shard, row * 2) for row in range(ROWS)]
    data = ShardData(keys, outputs, [(key, "ok", "") for key in keys], 1.0)
    Ledger(store).commit(stage, shard, data)


@pytest.fixture(params=[HOLE, -1], ids=["with holes", "whole"])
def dataset(tmp_path: Path, request) -> Store:
    store, missing = Store(str(tmp_path / "ours")), request.param
    for shard in SHARDS:
        keys = [sample_key(shard, row * 2) for row in range(ROWS)]
        rng, outputs = np.random.default_rng(shard), {}
        for name in LABELS.outputs:
            ext = modalities.get(name).ext
            members = [(f"{key}.{ext}", label(name, rng)) for key in keys]
            if name == "depth" and missing >= 0:
                members[missing] = hole(keys[missing], "unlabelled")
            outputs[name] = write_tar(members)
        commit(store, LABELS, shard, outputs)
        commit(store, DENSE, shard, {"tok_rgb": tokens(4, keys, missing)})
        commit(store, TEXT, shard, {"caption": tokens(None, keys, -1)})
    remember(store, "import", dict.fromkeys(LABELS.outputs, LABELS.id))
    store.write("tokenizers/rgb/x/weights.bin", b"weights")
    publish(
        Ledger(store),
        "main",
        {"rgb": LABELS, "tok_rgb": DENSE, "caption": TEXT},
        SHARDS,
        splits={"train": [0], "val": [2]},
        tokenizers={"rgb": {"path": "tokenizers/rgb/x", "vocab_size": 30_000, "num_tokens": 4}},
        meta={"crops": POLICY},
    )
    return store


def imported(store: Store, source: Store) -> Store:
    for job in import_jobs(store, source):
        work = build_work(store.url, job.stage, job.config)
        for shard in job.shards:
            Ledger(store).commit(job.stage, shard, work.run(shard))
    finish_import(store, source)
    return store


def contents(store: Store) -> dict[str, object]:
    """Hashes of everything a manifest names, and the labels behind it."""
    manifest = load_manifest(store, "main")
    found = {
        (name, shard): manifest.sha256(name, shard)
        for name in manifest.modalities
        for shard in manifest.shards()
    }
    labels = store.read_json("dataset.json")["import"]
    for name, stage in labels.items():
        for shard, commit in Ledger(store).commits(stage).items():
            found["label", name, shard] = commit.outputs[name]["sha256"]
    about = (manifest.splits, manifest.meta, manifest.tokenizers)
    return {"hashes": found, "about": about, "weights": store.read("tokenizers/rgb/x/weights.bin")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_round_trip_gives_the_same_tars_keys_splits_and_tokenizers(dataset, tmp_path, layout):
    out = Store(str(tmp_path / "out"))
    holes = any(b".missing" in dataset.read(p) for p in dataset.list("shards/fetch:depth"))
    done = export_set(dataset, out, layout=layout)
    back = imported(Store(str(tmp_path / "back")), out)
    assert done.left_out == (2 if holes and layout == "ml-4m" else 0)
    assert done.parts == ["caption", "depth", "det", "ids_caption", "rgb", "tok_rgb"]
    if not done.left_out:
        assert contents(back) == contents(dataset)
    again = Store(str(tmp_path / "again"))
    export_set(back, again, layout=layout)
    listed = [path for path in out.list("") if "fourm" not in path]
    assert [path for path in again.list("") if "fourm" not in path] == listed
    assert all(again.read(path) == out.read(path) for path in listed)


@pytest.mark.parametrize(
    ("begin", "end", "layout"),
    [("file", "s3", "ml-4m"), ("s3", "file", "webdataset"), ("s3", "s3", "parquet")],
)
def test_a_round_trip_may_begin_and_end_in_a_bucket(
    dataset, tmp_path, s3_url, begin, end, layout
):
    places = {"file": f"{tmp_path}/there", "s3": f"{s3_url}/{uuid.uuid4().hex}"}
    ours, out = (Store(f"{places[side]}/{name}") for side, name in ((begin, "ours"), (end, "out")))
    for path in dataset.list():
        ours.write(path, dataset.read(path))
    done = export_set(ours, out, layout=layout)
    back = imported(Store(f"{places[begin]}/back"), out)
    assert done.left_out or contents(back) == contents(dataset)


def test_ml_4m_looks_as_the_released_code_reads_it(dataset, tmp_path):
    out = Store(str(tmp_path / "out"))
    export_set(dataset, out, layout="ml-4m")
    keys = {
        name: [n.partition(".")[0] for n, _ in read_tar(out.read(f"{name}/shard-00001.tar"))]
        for name in ("rgb", "tok_rgb", "caption", "det", "crop_settings")
    }
    assert len({tuple(found) for found in keys.values()}) == 1
    name, data = next(read_tar(out.read("tok_rgb/shard-00000.tar")))
    array = np.load(io.BytesIO(data), allow_pickle=False)
    assert name.endswith(".npy")
    assert (array.dtype, array.shape) == (np.int16, (CROPS, 4))
    reader = BlockReader.from_bytes(tokens(4, [sample_key(0, 0)], -1))
    assert (array[1] == reader.fixed("crop1")[0][0]).all()
    _, boxes = next(read_tar(out.read("det/shard-00000.tar")))
    assert json.loads(boxes)["instances"][0].keys() == {"boxes", "class_name", "score"}


def test_crop_settings_are_the_windows_of_the_tokens_in_pixels(dataset, tmp_path):
    out = Store(str(tmp_path / "out"))
    export_set(dataset, out, layout="ml-4m", parts=["rgb", "tok_rgb"])
    for name, data in read_tar(out.read("crop_settings/shard-00000.tar")):
        settings = np.load(io.BytesIO(data), allow_pickle=False)
        assert settings.shape == (CROPS, 5)
        assert settings[0].tolist() == [0, 8, 48, 48, 0]
        for index, (top, left, height, width, flip) in enumerate(settings.tolist()):
            box = crop_box(CropPolicy(**POLICY), name.partition(".")[0], index, 64 / 48)
            assert abs(top - box.top * 48) <= 0.5
            assert abs(left + width - (box.left + box.width) * 64) <= 0.5
            assert flip == box.hflip
            assert top + height <= 48


def test_the_webdataset_package_reads_our_exports(dataset, tmp_path, monkeypatch):
    wds = pytest.importorskip("webdataset")
    for layout in ("webdataset", "ml-4m"):
        export_set(dataset, Store(str(tmp_path / layout)), layout=layout)
    tar = str(tmp_path / "webdataset" / "shard-00000.tar")
    samples = list(wds.WebDataset(tar, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [sample_key(0, 2 * i) for i in range(ROWS)]
    assert {"jpg", "txt", "det.json", "tok_rgb.npy"} <= samples[0].keys()
    ours = dataset.read(dataset.list("shards/fetch:caption")[0])
    assert [sample["txt"] for sample in samples] == [text for _, text in read_tar(ours)]
    names = str(tmp_path / "ml-4m" / "tok_rgb" / "shard-{00000..00001}.tar")
    assert all("npy" in sample for sample in wds.WebDataset(names, shardshuffle=False))


def test_parquet_is_a_row_a_sample(dataset, tmp_path):
    out = Store(str(tmp_path / "out"))
    export_set(dataset, out, layout="parquet", parts=["caption", "tok_rgb"])
    table = pq.read_table(tmp_path / "out" / "shard-00000.parquet")
    assert table.column_names == ["key", "caption", "caption.ext", "tok_rgb"]
    assert len(table["tok_rgb"][0].as_py()) == CROPS


def test_an_export_goes_on_and_refuses_the_place_of_another(dataset, tmp_path):
    out = Store(str(tmp_path / "out"))
    export_set(dataset, out, layout="parquet")
    first = out.version("shard-00000.parquet")
    out.delete("fourm.json")
    out.delete(next(path for path in out.list("fourm/") if "00001" in path))
    export_set(dataset, out, layout="parquet")
    assert out.version("shard-00000.parquet") == first
    with pytest.raises(ValueError, match="holds another export"):
        export_set(dataset, out, layout="webdataset")
    with pytest.raises(ValueError, match="no part 'nose'; there are caption"):
        export_set(dataset, Store(str(tmp_path / "x")), layout="parquet", parts=["nose"])


def test_an_export_that_was_broken_off_keeps_its_place(dataset, tmp_path, monkeypatch):
    out = Store(str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_json", _killed)
        with pytest.raises(KeyboardInterrupt):
            export_set(dataset, out, layout="parquet")
    with pytest.raises(ValueError, match="holds another export"):
        export_set(dataset, out, layout="parquet", parts=["rgb"])
    export_set(dataset, out, layout="parquet")
    assert contents(imported(Store(str(tmp_path / "back")), out)) == contents(dataset)


def _killed(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_labels_that_few_shards_have_are_left_out_unless_asked_for(dataset, tmp_path, caplog):
    key = sample_key(0, 0)
    features = Stage("label:clip", 1, {}, ("clip",))
    data = ShardData([key], {"clip": write_tar([(f"{key}.npy", b"")])}, [(key, "ok", "")], 1.0)
    Ledger(dataset).commit(features, 0, data)
    labels = dataset.read_json("dataset.json")["import"]
    remember(dataset, "import", {**labels, "clip": features.id})
    done = export_set(dataset, Store(str(tmp_path / "out")), layout="webdataset")
    assert done.parts == ["caption", "depth", "det", "ids_caption", "rgb", "tok_rgb"]
    assert "clip is left out: it lacks 1 shards" in caplog.text
    with pytest.raises(ValueError, match="clip lacks shard 2"):
        export_set(dataset, Store(str(tmp_path / "x")), layout="parquet", parts=["clip"])


def test_a_tampered_export_is_refused_on_import(dataset, tmp_path):
    out, store = Store(str(tmp_path / "out")), Store(str(tmp_path / "back"))
    export_set(dataset, out, layout="webdataset")
    data = bytearray(out.read("shard-00000.tar"))
    data[data.index(b"a cube") + 2] ^= 1
    out.write("shard-00000.tar", bytes(data))
    job = import_jobs(store, out)[0]
    work = build_work(store.url, job.stage, job.config)
    work.run(2)
    with pytest.raises(TornShard, match="caption of shard 0"):
        work.run(0)


def test_codes_that_do_not_fit_int16_are_refused(dataset, tmp_path):
    keys = [sample_key(5, 0)]
    writer = BlockWriter({"crop0": Column("uint16", 1)}, {})
    writer.add(keys[0], {"crop0": [40_000]})
    data = ShardData(keys, {"tok_rgb": writer.finish()}, [(keys[0], "ok", "")], 1.0)
    stage = Stage("tokens:rgb", 2, {}, ("tok_rgb",))
    Ledger(dataset).commit(stage, 5, data)
    publish(Ledger(dataset), "big", {"tok_rgb": stage}, [5])
    out = Store(str(tmp_path / "big"))
    with pytest.raises(ValueError, match="tokens above 32767"):
        export_set(dataset, out, layout="ml-4m", manifest="big", parts=["tok_rgb"])


def released(root: Path, rows: int = 3) -> Store:
    """A set as the released code makes it."""
    rng = np.random.default_rng(0)
    boxes = b'{"instances": [{"boxes": [0, 0, 1, 1], "class_name": "c", "score": 1}]}'
    for shard in range(2):
        members: dict[str, list[tuple[str, bytes]]] = {}
        for row in range(rows):
            values = {
                "rgb": ("jpg", label("rgb", rng)),
                "caption": ("txt", b"a cube"),
                "det": ("json", boxes),
                "tok_rgb@224": ("npy", npy(rng.integers(0, 16_384, (2, 196)).astype(np.int16))),
                "crop_settings": ("npy", npy(np.array([[0, 8, 48, 48, 0], [1, 2, 40, 40, 1]]))),
            }
            for name, (ext, data) in values.items():
                members.setdefault(name, []).append((f"{shard}{row:03}.{ext}", data))
        for name, content in members.items():
            (root / name).mkdir(parents=True, exist_ok=True)
            (root / name / f"shard-{shard:05}.tar").write_bytes(write_tar(content))
    return Store(str(root))


def test_a_set_of_the_released_code_is_imported_from_its_folders(tmp_path):
    source = released(tmp_path / "theirs")
    store = imported(Store(str(tmp_path / "ours")), source)
    manifest = load_manifest(store, "main")
    assert list(manifest.modalities) == ["tok_rgb"]
    assert manifest.tokenizers["rgb"] == {
        "path": "", "fingerprint": "", "vocab_size": 16_384, "num_tokens": 196,
    }  # fmt: skip
    assert CropPolicy(**manifest.meta["crops"]).size == 224
    reader = BlockReader.from_bytes(store.read(manifest.path("tok_rgb", 1)))
    assert reader.keys == ["1000", "1001", "1002"]
    theirs = dict(read_tar(source.read("tok_rgb@224/shard-00001.tar")))
    expected = np.load(io.BytesIO(theirs["1002.npy"]), allow_pickle=False)
    assert (reader.fixed("crop1")[0][2] == expected[1]).all()
    labels = store.read_json("dataset.json")["import"]
    det = Ledger(store).read_commit(labels["det"], 0).outputs["det"]["path"]
    (value, *_) = [modalities.get("det").decode(data) for _, data in read_tar(store.read(det))]
    assert value["instances"][0]["box"] == [0, 0, 1, 1]
    assert labels.keys() == {"rgb", "caption", "det", "crop_settings"}


def test_released_sets_of_two_sizes_are_imported_side_by_side(tmp_path):
    source = released(tmp_path / "theirs")
    rng = np.random.default_rng(1)
    for shard in range(2):
        members = [(f"{shard}{row:03}.npy",
                    npy(rng.integers(0, 16_384, (2, 784)).astype(np.int16))) for row in range(3)]
        source.write(f"tok_rgb@448/shard-{shard:05}.tar", write_tar(members))
    store = imported(Store(str(tmp_path / "ours")), source)
    manifest = load_manifest(store, "main")
    assert list(manifest.modalities) == ["tok_rgb", "tok_rgb@448"]
    assert CropPolicy(**manifest.meta["crops"]).size == 224
    assert manifest.tokenizers["rgb@448"] == {**manifest.tokenizers["rgb"], "num_tokens": 784}
    for name, count in (("tok_rgb", 196), ("tok_rgb@448", 784)):
        reader = BlockReader.from_bytes(store.read(manifest.path(name, 1)))
        assert reader.fixed("crop0")[0].shape == (3, count)
    specs = modality_specs(manifest, max_text=8)
    assert [spec.name for spec in specs] == ["tok_rgb@224", "tok_rgb@448"]


@pytest.mark.parametrize(
    ("name", "member", "sentence"),
    [
        ("tok_x", ("0000.npy", b"\x93NUMPY broken"), "not a plain .npy"),
        ("tok_x", ("0000.npy", npy(np.zeros(3))), "tokens are float64"),
        ("x", ("0000.pkl", b"cos\nsystem\n."), "neither tokens nor a known file"),
    ],
)
def test_what_is_no_token_set_is_refused_by_name(tmp_path, name, member, sentence):
    folder = tmp_path / "theirs" / name
    folder.mkdir(parents=True)
    (folder / "shard-00000.tar").write_bytes(write_tar([member]))
    with pytest.raises(ValueError, match=sentence):
        import_jobs(Store(str(tmp_path / "ours")), Store(str(tmp_path / "theirs")))


def test_a_missing_shard_of_one_folder_is_named(tmp_path):
    source = released(tmp_path / "theirs")
    source.delete("caption/shard-00001.tar")
    with pytest.raises(ValueError, match="caption holds shards 00000 to 00000"):
        import_jobs(Store(str(tmp_path / "ours")), source)


def test_pickled_and_negative_tokens_are_refused(tmp_path):
    for bad in (np.array([{"a": 1}], object), np.full((2, 196), -5, np.int16)):
        root = tmp_path / str(bad.dtype)
        source = released(root / "theirs")
        buffer = io.BytesIO()
        np.save(buffer, bad, allow_pickle=True)
        members = list(read_tar(source.read("tok_rgb@224/shard-00001.tar")))
        members[1] = (members[1][0], buffer.getvalue())
        source.write("tok_rgb@224/shard-00001.tar", write_tar(members))
        store = Store(str(root / "ours"))
        job = next(j for j in import_jobs(store, source) if j.stage.name == "import:tokens")
        with pytest.raises(ValueError, match=r"not a plain \.npy|negative tokens"):
            build_work(store.url, job.stage, job.config).run(1)


@pytest.mark.parametrize(
    ("ext", "data", "sentence"),
    [
        ("npy", npy(np.full((2, 3), 70_000)), "outside uint16"),
        ("npy", npy(np.full((2, 3), 1.5)), "not a list of tokens"),
        ("npy", npy(np.full((2, 3), "a")), "not a list of tokens"),
        ("npy", npy(np.array(3)), "has not the 2 crops"),
        ("json", b"[[1, 2, 3], [4, 5, 70000]]", "outside uint16"),
        ("json", b"[[1, 2, 3], [4, 5, 6.5]]", "not a list of tokens"),
        ("json", b"[[1, 2, 3], null]", "not a list of tokens"),
        ("json", b"[" * 100_000, "nested too deep"),
    ],
)
def test_tokens_that_are_no_whole_numbers_or_do_not_fit_are_refused(tmp_path, ext, data, sentence):
    part = Part("tok_x", "tok_x", (("crop0", "uint16", 3), ("crop1", "uint16", 3)))
    source = Store(str(tmp_path))
    source.write("tok_x/shard-00000.tar", write_tar([(f"00000000007.{ext}", data)]))
    with pytest.raises(ValueError, match=f"shard-00000.tar: 00000000007.*{sentence}"):
        read_shard("ml-4m", source, 0, [part])


def test_a_table_with_other_columns_than_its_set_is_refused_by_its_name(tmp_path):
    parts = [Part("tok_x", "tok_x", (("crop0", "uint16", None),)), Part("caption", "caption")]
    columns = {
        "key": pa.array(["a"]),
        "tok_x": pa.array([[[1, 2]]]),
        "caption": pa.array([b"dog"]),
        "caption.ext": pa.array(["txt"]),
    }
    source = Store(str(tmp_path))

    def read(**changes):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns | changes), sink)
        source.write("shard-00000.parquet", sink.getvalue().to_pybytes())
        return read_shard("parquet", source, 0, parts)

    assert read().files["caption"] == [("txt", b"dog")]
    for name, column in (
        ("key", pa.array([1])),
        ("key", pa.array([None], pa.string())),
        ("tok_x", pa.array([[[1, 70_000]]])),
        ("tok_x", pa.array([[[1, None]]])),
        ("tok_x", pa.array([[[-1]]])),
        ("tok_x", pa.array([[[1.5]]])),
        ("tok_x", pa.array(["x"])),
        ("caption", pa.array([None], pa.binary())),
        ("caption.ext", pa.array([10**9], pa.date32())),
    ):
        with pytest.raises(ValueError, match=f"shard-00000.parquet: .*{name}"):
            read(**{name: column})
    del columns["caption.ext"]
    with pytest.raises(ValueError, match=r"0 columns 'caption\.ext'"):
        read()
    source.write("shard-00000.parquet", b"PAR1")
    with pytest.raises(ValueError, match="not a Parquet file"):
        read_shard("parquet", source, 0, parts)
