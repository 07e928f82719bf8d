"""Labelling a shard: same keys and order as the pictures, holes with reasons, fingerprints."""

from __future__ import annotations

import dataclasses
import io
import struct
import time
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from infra.ledger import Ledger, ShardData, Stage
from infra.shards import hole, read_tar, write_tar
from infra.store import Store
from infra.units import SystemicFailure
from models import modalities
from models.labelers import LabelerSpec, preset
from models.labelers.base import Image, Labeler
from tasks.label import in_turns, label_jobs, label_stage, label_stages
from tasks.label_work import LabelWork, build_work

FETCH = Stage("fetch", 1, {}, ("rgb", "caption"))
SPEC = LabelerSpec("depth", ("depth",), "org/model", revision="1", batch_size=2, device="cpu")


class Brightness(Labeler):
    """Depth is brightness. White pictures cannot be labelled, nor more than `fits` at once."""

    fits = 100

    def predict(self, images: Sequence[Image]) -> dict[str, list[Any]]:
        if len(images) > self.fits:
            raise torch.OutOfMemoryError("no memory")
        if any(image.min() == 255 for image in images):
            raise RuntimeError("too white")
        return {"depth": [image[..., 0].astype(np.float32) / 255 for image in images]}


def jpeg(level: int, size: int = 16) -> bytes:
    buffer = io.BytesIO()
    Pillow.fromarray(np.full((size, size, 3), level, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def commit_pictures(store: Store, members: list[tuple[str, bytes]]) -> None:
    keys = [name.split(".")[0] for name, _ in members]
    texts = write_tar((f"{key}.txt", b"text") for key in keys)
    data = ShardData(
        keys=keys,
        outputs={"rgb": write_tar(members), "caption": texts},
        statuses=[(key, "ok", "") for key in keys],
        seconds=1.0,
    )
    Ledger(store).commit(FETCH, 0, data)


def run(store: Store) -> ShardData:
    stage = label_stage(SPEC, FETCH)
    data = LabelWork(store, stage, Brightness(SPEC)).run(0)
    Ledger(store).commit(stage, 0, data)
    return data


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def test_bytes_at_which_a_decoder_raises_whatever_it_likes_are_one_hole(tmp_path):
    buffer = io.BytesIO()
    Pillow.fromarray(np.zeros((16, 16, 3), np.uint8)).save(buffer, "PNG")
    start, _, end = buffer.getvalue().partition(b"\0\0\0\0IEND")
    size = struct.pack(">II", 100_000, 100_000) + b"\x08\x02\0\0\0"
    commit_pictures(store := Store(str(tmp_path)), [
        ("00000000001.jpg", jpeg(100)),
        ("00000000002.png", start + png_chunk(b"iCCP", b"") + b"\0\0\0\0IEND" + end),
        ("00000000003.png", start[:8] + png_chunk(b"IHDR", size) + png_chunk(b"IDAT", b"0000")),
    ])  # fmt: skip
    assert [r for _, r, _ in run(store).statuses] == ["ok", "undecodable", "undecodable"]


def test_labels_have_the_pictures_keys_and_order_and_failures_are_holes(tmp_path):
    store = Store(str(tmp_path))
    pictures = [
        ("00000000007.jpg", jpeg(100)),
        ("00000000002.jpg", b"no picture"),
        ("00000000003.jpg", jpeg(255)),
        hole("00000000004", "gone"),
        ("00000000005.jpg", jpeg(200, size=24)),
    ]
    commit_pictures(store, pictures)
    data = run(store)
    members = dict(read_tar(data.outputs["depth"]))
    assert [name.split(".")[0] for name in members] == data.keys
    assert data.keys == [name.split(".")[0] for name, _ in pictures]
    assert [reason for _, reason, _ in data.statuses] == [
        "ok", "undecodable", "unlabelled", "no_picture", "ok",
    ]  # fmt: skip
    assert "too white" in data.statuses[2][2]
    decode = modalities.get("depth").decode
    assert decode(members["00000000007.png"]).mean() == pytest.approx(100 / 255, abs=0.01)
    assert decode(members["00000000005.png"]).shape == (24, 24)
    assert b"unlabelled" in members["00000000003.missing"]


@pytest.mark.parametrize(("slow", "what"), [("_decode", "input"), ("_encode", "output")])
def test_a_commit_tells_what_its_network_waited_for(tmp_path, monkeypatch, slow, what):
    step = getattr(LabelWork, slow)
    monkeypatch.setattr(LabelWork, slow, lambda *words: time.sleep(0.8) or step(*words))
    store = Store(str(tmp_path))
    commit_pictures(store, [("00000000000.jpg", jpeg(9))])
    data = run(store)
    assert data.waited.keys() == {"input", "output"}
    assert 0.1 < data.waited[what] <= sum(data.waited.values()) <= data.seconds + 0.002
    assert Ledger(store).read_commit(label_stage(SPEC, FETCH), 0).waited == data.waited


@pytest.mark.parametrize(("precision", "fast", "used"), [
    ("auto", True, "bf16"), ("auto", False, "fp32"), ("fp16", True, "fp16"),
])  # fmt: skip
def test_a_commit_tells_the_precision_that_auto_was_on_its_machine(
    tmp_path, monkeypatch, precision, fast, used
):
    monkeypatch.setattr("models.labelers.base.fast_bf16", lambda device: fast)
    store, own = Store(str(tmp_path)), dataclasses.replace(SPEC, precision=precision)
    commit_pictures(store, [("00000000000.jpg", jpeg(9))])
    data = LabelWork(store, label_stage(own, FETCH), Brightness(own)).run(0)
    assert data.info == {"device": "cpu", "precision": used}


def test_a_picture_that_its_network_cannot_see_is_a_hole_with_a_reason(tmp_path):
    store = Store(str(tmp_path))
    commit_pictures(store, [("00000000000.jpg", jpeg(9, size=64)), ("00000000001.jpg", jpeg(9, 1))])
    spec = dataclasses.replace(preset("scenes")["depth"], device="cpu", precision="fp32")
    stage = label_stage(spec, FETCH)
    data = build_work(str(tmp_path), stage, spec.to_dict()).run(0)
    assert [reason for _, reason, _ in data.statuses] == ["ok", "unlabelled"]
    assert data.statuses[1][2]


def test_a_shard_without_any_label_is_an_error_and_not_a_shard_of_holes(tmp_path):
    store = Store(str(tmp_path))
    commit_pictures(store, [("00000000000.jpg", jpeg(255)), ("00000000001.jpg", jpeg(255))])
    with pytest.raises(RuntimeError, match=r"labelled no picture of shard 0.*too white"):
        run(store)


def test_little_memory_changes_no_label_and_none_at_all_fails_the_shard(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    levels = (10, 200, 255, 90, 40)
    commit_pictures(store, [(f"0000000000{n}.jpg", jpeg(v)) for n, v in enumerate(levels)])
    whole = run(store)
    monkeypatch.setattr(Brightness, "fits", 1)
    again = LabelWork(store, label_stage(SPEC, FETCH), Brightness(SPEC)).run(0)
    assert (again.outputs, again.statuses) == (whole.outputs, whole.statuses)
    monkeypatch.setattr(Brightness, "fits", 0)
    with pytest.raises(MemoryError, match="no memory"):
        run(store)


def test_an_empty_shard_is_labelled_as_an_empty_shard(tmp_path):
    store = Store(str(tmp_path))
    commit_pictures(store, [])
    assert run(store).keys == []


def test_the_fingerprint_holds_what_changes_labels_and_nothing_else():
    base = label_stage(SPEC, FETCH).fingerprint
    for same in ({"batch_size": 7}, {"device": "auto"}, {"compile": True}):
        assert label_stage(dataclasses.replace(SPEC, **same), FETCH).fingerprint == base
    for other in ({"revision": "2"}, {"precision": "bf16"}, {"options": {"max_depth": 10.0}}):
        assert label_stage(dataclasses.replace(SPEC, **other), FETCH).fingerprint != base
    assert label_stage(SPEC, dataclasses.replace(FETCH, version=2)).fingerprint != base


class Batches(Brightness):
    """Tells the sizes of the pictures of each batch."""

    def __init__(self, spec: LabelerSpec) -> None:
        super().__init__(spec)
        self.batches: list[list[int]] = []

    def predict(self, images: Sequence[Image]) -> dict[str, list[Any]]:
        self.batches.append([image.shape[0] for image in images])
        return super().predict(images)


def test_pictures_of_one_size_meet_across_others_and_labels_keep_their_order(
    tmp_path, monkeypatch
):
    store = Store(str(tmp_path))
    sizes = [16, 24, 32, 16, 24, 16, 24, 16, 24, 32, 16]
    pictures = [(f"{n:011d}.jpg", jpeg(10 + 20 * n, size)) for n, size in enumerate(sizes)]
    commit_pictures(store, [*pictures, ("00000000011.jpg", b"no picture")])

    def labelled() -> tuple[list[list[int]], ShardData]:
        labeler = Batches(SPEC)
        return labeler.batches, LabelWork(store, label_stage(SPEC, FETCH), labeler).run(0)

    batches, data = labelled()
    assert sorted(map(tuple, batches)) == [
        (16,), (16, 16), (16, 16), (24, 24), (24, 24), (32, 32),
    ]  # fmt: skip
    members = [modalities.get("depth").decode(each) for _, each in read_tar(data.outputs["depth"])
               if len(each) > 50]  # fmt: skip
    assert [(len(value), round(float(value.mean() * 255))) for value in members] == [
        (size, 10 + 20 * number) for number, size in enumerate(sizes)
    ]
    monkeypatch.setattr("tasks.label_work.MOST_PIXELS", 0)
    fewer, again = labelled()
    assert len(fewer) > len(batches)
    assert (again.outputs, again.statuses) == (data.outputs, data.statuses)


def test_a_job_can_be_rebuilt_from_its_json(tmp_path):
    (job,) = label_jobs([SPEC], FETCH, range(3))
    assert job.shards == (0, 1, 2)
    assert LabelerSpec.from_dict(job.config) == SPEC
    assert job.stage.upstream == (FETCH,)


def test_weights_that_cannot_be_loaded_stop_the_run_and_are_named(tmp_path):
    spec = dataclasses.replace(SPEC, model_id=str(tmp_path / "absent"))
    with pytest.raises(SystemicFailure, match="absent"):
        build_work(str(tmp_path), label_stage(spec, FETCH), spec.to_dict())


def test_a_missing_compiler_stops_the_run_before_a_picture_is_labelled(tmp_path, monkeypatch):
    import torch._inductor.cpp_builder as builder

    def missing() -> str:
        raise RuntimeError("no g++")

    monkeypatch.setattr(builder, "get_cpp_compiler", missing)
    compiled = dataclasses.replace(SPEC, compile=True)
    with pytest.raises(SystemicFailure, match=r"'depth'.*no compiler for cpu \(no g\+\+\)"):
        build_work(str(tmp_path), label_stage(compiled, FETCH), compiled.to_dict())


def test_an_output_that_is_no_modality_is_named_before_any_work():
    with pytest.raises(ValueError, match="unknown modality 'taste'"):
        label_stage(dataclasses.replace(SPEC, outputs=("taste",)), FETCH)


# --- labels that other labels are made from ---------------------------------------------------


def spec(kind: str, *outputs: str) -> LabelerSpec:
    return LabelerSpec(kind, outputs or (kind,), "org/model", revision="1", device="cpu")


def computed(kind: str) -> LabelerSpec:
    return LabelerSpec(kind, (kind,), "computed", batch_size=2, precision="fp32", device="cpu")


def test_what_reads_other_labels_has_them_upstream_and_comes_after_them():
    specs = [computed("metadata"), spec("human_poses"), spec("det"), spec("t5_caption")]
    stages = label_stages(specs, FETCH)
    assert stages["det"].upstream == (FETCH,)
    assert stages["human_poses"].upstream == (FETCH, stages["det"])
    assert set(stages["metadata"].upstream) == {FETCH, stages["det"], stages["human_poses"]}
    assert stages["t5_caption"].upstream == (FETCH,)
    turns = in_turns(label_jobs(specs, FETCH, range(2)))
    assert [[job.stage.name for job in turn] for turn in turns] == [
        ["label:det", "label:t5_caption"], ["label:human_poses"], ["label:metadata"],
    ]  # fmt: skip


def test_a_labeler_s_caption_goes_before_the_list_s():
    stages = label_stages([spec("t5_caption"), spec("caption")], FETCH)
    assert stages["t5_caption"].upstream == (FETCH, stages["caption"])


def test_a_label_that_nothing_writes_is_named_before_any_work():
    with pytest.raises(ValueError, match="'human_poses' looks at 'det', which nothing writes"):
        label_stages([spec("human_poses")], FETCH)


class Names(Labeler):
    """The caption, and the number of boxes where there are any."""

    reads = ("caption", "depth")
    also_reads = ("det",)

    def predict(self, images: Sequence[Any]) -> dict[str, list[Any]]:
        return {"metadata": [
            {"caption_n_chars": len(each["caption"]), "brightness": float(each["depth"].max()),
             "n_coco_instances": len(each.get("det", {"instances": []})["instances"])}
            for each in images
        ]}  # fmt: skip

    def label_samples(self, samples: Sequence[Any]) -> dict[str, list[Any]]:
        assert all("rgb" not in sample for sample in samples)
        return self.in_batches(samples)


def test_samples_bring_their_labels_and_holes_upstream_are_holes_or_absent(tmp_path):
    store = Store(str(tmp_path))
    keys = [f"0000000000{n}" for n in range(4)]
    commit_pictures(store, [(f"{key}.jpg", jpeg(50)) for key in keys])
    depth, det = Stage("label:depth", 1, {}, ("depth",), (FETCH,)), Stage(
        "label:det", 1, {}, ("det",), (FETCH,)
    )
    far = modalities.get("depth").encode(np.ones((4, 4), np.float32))
    box = {"box": [0, 0, 1, 1], "class_name": "cube"}
    boxes = modalities.get("det").encode({"instances": [box]})
    members = {
        depth: [hole(keys[0], "x"), *((f"{key}.png", far) for key in keys[1:])],
        det: [*((f"{key}.json", boxes) for key in keys[:2]), hole(keys[2], "x"),
              (f"{keys[3]}.json", b"{}")],
    }  # fmt: skip
    for stage, tar in members.items():
        outputs = {stage.outputs[0]: write_tar(tar)}
        statuses = [(key, "ok", "") for key in keys]
        Ledger(store).commit(stage, 0, ShardData(keys, outputs, statuses, 1.0))
    own = LabelerSpec("metadata", ("metadata",), "computed", batch_size=8, device="cpu")
    stage = Stage("label:metadata", 1, {}, ("metadata",), (FETCH, depth, det))
    data = LabelWork(store, stage, Names(own)).run(0)
    reasons = [reason for _, reason, _ in data.statuses]
    assert reasons == ["no_label", "ok", "ok", "undecodable"]
    assert "label:depth" in data.statuses[0][2]
    found = dict(read_tar(data.outputs["metadata"]))
    decode = modalities.get("metadata").decode
    assert decode(found[f"{keys[1]}.json"]) == {
        "caption_n_chars": 4, "brightness": 1.0, "n_coco_instances": 1,
    }  # fmt: skip
    assert decode(found[f"{keys[2]}.json"])["n_coco_instances"] == 0


def test_a_value_that_cannot_be_stored_is_a_hole_of_its_sample_alone(tmp_path):
    class Odd(Labeler):
        def predict(self, images: Sequence[Image]) -> dict[str, list[Any]]:
            values = [float(image.max()) for image in images]
            return {"metadata": [{"entropy": v if v < 200 else float("nan")} for v in values]}

    store = Store(str(tmp_path))
    commit_pictures(store, [("00000000000.jpg", jpeg(50)), ("00000000001.jpg", jpeg(250))])
    own = LabelerSpec("metadata", ("metadata",), "computed", batch_size=8, device="cpu")
    stage = Stage("label:metadata", 1, {}, ("metadata",), (FETCH,))
    data = LabelWork(store, stage, Odd(own)).run(0)
    assert [reason for _, reason, _ in data.statuses] == ["ok", "unlabelled"]
