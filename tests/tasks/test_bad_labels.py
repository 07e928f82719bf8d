"""Labels at the edge: nothing said, nothing found, hundreds found, and files of other versions."""

from __future__ import annotations

import io
import json
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infra import ui
from infra.blocks import BlockReader
from infra.ledger import Ledger, ShardData, Stage
from infra.shards import sample_key, write_tar
from infra.store import Store
from models import modalities
from models.crops import CropBox, CropPolicy
from models.labelers import LabelerSpec
from models.labelers.base import Labeler
from models.modalities.sam_instance import instance
from tasks.label_work import LabelWork
from tasks.pictures import BadPicture, PicturePolicy, cleaned
from tasks.tokenize import build_work, token_jobs, token_stage
from tasks.tokenizer_config import TextRecipe
from tasks.tokenizer_data import read_values
from tasks.train_tokenizers import TEXT, TokenizerInfo, train_tokenizers
from tests.tasks.test_pictures import encoded

POLICY = CropPolicy(num_crops=1, size=64)
WORDS = ("human", "none", "point", "polygon", "pose")
MANY = 500


def people(count: int) -> dict[str, Any]:
    joints = [[0.2, 0.3, 0.9]] * 17
    return {"humans": [{"box": [0.1, 0.1, 0.5, 0.9], "score": 0.9, "keypoints": joints}] * count}


def boxes(count: int) -> dict[str, Any]:
    places = np.random.default_rng(0).uniform(0, 0.5, (count, 2))
    return {"instances": [
        {"box": [x, y, x + 0.3, y + 0.4], "class_name": "cube", "score": 0.9} for x, y in places
    ]}  # fmt: skip


def stage_of(name: str) -> Stage:
    return Stage(f"label:{name}", 1, {}, (name,), (Stage("fetch", 1, {}, ("rgb",)),))


def commit(store: Store, name: str, members: list[bytes]) -> Stage:
    """A shard of labels, and of the pictures that they belong to."""
    stage, keys = stage_of(name), [sample_key(0, row) for row in range(len(members))]
    picture = encoded(Image.new("RGB", (64, 64)), "JPEG")
    made = {stage.upstream[0]: ("rgb", [picture] * len(keys)), stage: (name, members)}
    for each, (modality, contents) in made.items():
        ext = modalities.get(modality).ext
        tar = write_tar((f"{key}.{ext}", data) for key, data in zip(keys, contents, strict=True))
        statuses = [(key, "ok", "") for key in keys]
        Ledger(store).commit(each, 0, ShardData(keys, {modality: tar}, statuses, 1.0))
    return stage


def text_of(store: Store, stages: dict[str, Stage]) -> TokenizerInfo:
    recipe = TextRecipe(bins=64, vocab_size=700, class_names=("cube",), words=WORDS)
    return train_tokenizers(store, stages, {}, shards=[0], text=recipe)[TEXT]


def tokenized(store: Store, name: str, values: list[Any]) -> list[np.ndarray]:
    """Ids of labels, each of which is a sample."""
    stage = commit(store, name, [modalities.get(name).encode(value) for value in values])
    tokens = token_stage(name, text_of(store, {name: stage}), POLICY, stage)
    (job,) = token_jobs([tokens], [0])
    data = build_work(store.url, job.stage, job.config).run(0)
    found = Ledger(store).commit(tokens, 0, data)
    reader = BlockReader(store.local(found.outputs[name]["path"]))
    assert reader.valid("crop0").all()
    return [reader.ragged("crop0", row) for row in range(len(values))]


def test_an_empty_caption_is_no_tokens_and_no_hole(tmp_path) -> None:
    empty, said = tokenized(Store(str(tmp_path)), "caption", ["", "a cube on a cube"])
    assert len(empty) == 0
    assert len(said) > 0


def test_a_caption_of_any_characters_and_any_length_is_tokens_and_no_hole(tmp_path) -> None:
    odd = ["x" * 10_000, "a cube " * 5_000, "\x00\n\t", "\N{GRINNING FACE} \u202e"]
    found = tokenized(Store(str(tmp_path)), "caption", ["a cube on a cube", *odd])
    assert [len(ids) for ids in found[1:]] == [1, 10_000, 0, 1]


@pytest.mark.parametrize(("name", "make", "none", "each"), [
    ("det", boxes, 0, 5), ("human_poses", people, 1, 40),
])  # fmt: skip
def test_no_object_and_500_objects_are_told_whole(tmp_path, name, make, none, each) -> None:
    """Models read as many of them as their longest text holds, the nearest boxes first."""
    nothing, crowd = tokenized(Store(str(tmp_path)), name, [make(0), make(MANY)])
    assert len(nothing) == none
    assert len(crowd) == MANY * each


def test_500_instances_and_none_are_told_at_seven_points() -> None:
    from models.modalities.sam_instance import POINTS
    from tests.models.test_text_forms import MANY as TEXT_TOKENIZER
    from tests.models.test_text_forms import form_of, page_of

    full = instance(np.ones((32, 32), bool), 0.9)
    crowd = {"size": [32, 32], "instances": [full] * MANY}
    page = page_of(TEXT_TOKENIZER, size=32)
    line = form_of("sam_instance").write(crowd, page)
    assert len(line.split()) == 290
    # Equal instances are one when they are read, the one that the end cuts off is left out.
    assert len(form_of("sam_instance").read(line, page)["instances"]) == 1
    empty = form_of("sam_instance").write({"size": [32, 32], "instances": []}, page)
    assert empty.split().count("none") == empty.split().count("point") == POINTS


@pytest.mark.parametrize(("name", "content"), [
    ("human_poses", {"version": 2, "people": []}),
    ("human_poses", {"humans": ["someone"]}),
    ("human_poses", {"humans": [{"keypoints": [[0, 0, 1]] * 17}]}),
    ("det", {"boxes": []}),
    ("det", {"instances": [{"bbox": [0, 0, 1, 1], "class_name": "cube"}]}),
    ("det", {"instances": [{"box": [0, 0, 1], "class_name": "cube"}]}),
    ("det", {"instances": [{"box": [0, 0, 1, 1], "label": 3}]}),
    ("metadata", {"width": 3}),
    ("color_palette", {"1": [[0, 0, 0]]}),
    ("sam_instance", {"masks": []}),
])  # fmt: skip
def test_a_label_file_of_another_version_is_an_error_that_names_its_sample(
    tmp_path, name, content
) -> None:
    store = Store(str(tmp_path))
    stage = commit(store, name, [json.dumps(content).encode()])
    with pytest.raises(ValueError, match=f"the {name} of sample 00000000000 is not in the format"):
        list(read_values(Ledger(store), stage, 0, name))


def test_tokenizing_a_label_file_of_another_version_names_its_sample(tmp_path) -> None:
    store = Store(str(tmp_path))
    stage = commit(store, "human_poses", [b'{"people": []}'])
    tokens = token_stage("human_poses", text_of(store, {"human_poses": stage}), POLICY, stage)
    (job,) = token_jobs([tokens], [0])
    with pytest.raises(ValueError, match="human_poses of sample 00000000000 is not in the format"):
        build_work(store.url, job.stage, job.config).run(0)


@pytest.mark.parametrize(("name", "content"), [
    ("human_poses", {"humans": ["someone"]}),
    ("det", {"instances": [{"bbox": [0, 0, 1, 1]}]}),
    ("metadata", {"width": 3}),
])  # fmt: skip
def test_a_labeler_that_reads_a_label_file_of_another_version_leaves_a_hole_for_that_sample(
    tmp_path, name, content
) -> None:
    class Reader(Labeler):
        reads = (name,)

        def label_samples(self, samples: Any) -> dict[str, list[Any]]:
            return self.in_batches([sample[name] for sample in samples])

        def predict(self, images: Any) -> dict[str, list[Any]]:
            return {"caption": ["read"] * len(images)}

    store = Store(str(tmp_path))
    good = {"human_poses": people(1), "det": boxes(1), "metadata": {"entropy": 1.0}}[name]
    members = [modalities.get(name).encode(good), json.dumps(content).encode()]
    upstream = commit(store, name, members)
    stage = Stage("label:caption", 1, {}, ("caption",), (*upstream.upstream, upstream))
    spec = LabelerSpec("caption", ("caption",), "computed", device="cpu", precision="fp32")
    data = LabelWork(store, stage, Reader(spec)).run(0)
    assert [reason for _, reason, _ in data.statuses] == ["ok", "undecodable"]
    assert f"the {name} of sample 00000000001 is not in the format" in data.statuses[1][2]


def test_a_labeler_of_another_version_writes_beside_the_old_labels(tmp_path) -> None:
    """Their fingerprints differ, so that what is read is never a mixture."""
    store = Store(str(tmp_path))
    old = commit(store, "det", [modalities.get("det").encode(boxes(1))])
    new = Stage(old.name, old.version + 1, old.params, old.outputs, old.upstream)
    assert Ledger(store).committed(new) == set()
    with pytest.raises(FileNotFoundError):
        list(read_values(Ledger(store), new, 0, "det"))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1", "I;16"])
def test_pictures_of_any_mode_come_in_as_rgb_of_the_target_size(mode: str) -> None:
    image = Image.new(mode, (300, 400))
    form = "JPEG" if mode == "CMYK" else "PNG"
    found = Image.open(io.BytesIO(cleaned(encoded(image, form), PicturePolicy()).data))
    assert (found.mode, found.size) == ("RGB", (256, 341))


def test_a_picture_of_one_pixel_is_dropped_and_one_of_20_megapixels_shrunk() -> None:
    with pytest.raises(BadPicture) as caught:
        cleaned(encoded(Image.new("RGB", (1, 1)), "PNG"), PicturePolicy())
    assert caught.value.reason == "too_small"
    large = cleaned(encoded(Image.new("RGB", (5000, 4000)), "JPEG"), PicturePolicy())
    assert (large.width, large.height) == (5000, 4000)
    assert Image.open(io.BytesIO(large.data)).size == (320, 256)
    kept = cleaned(encoded(Image.new("RGB", (1, 1)), "PNG"), PicturePolicy(min_side=1))
    assert Image.open(io.BytesIO(kept.data)).size == (1, 1)


# --- values at the edge of a modality, cropped for its tokenizer and rendered ------------------


def of_size(name: str, height: int, width: int) -> np.ndarray:
    """A value of a modality whose values have the size of the picture."""
    value = np.zeros((height, width), np.uint8)
    if name == "depth":
        return value.astype(np.float32)
    if name in ("rgb", "normal"):
        value = np.stack([value, value, value + 1], axis=-1)
    return value if name == "rgb" else value.astype(np.float32) if name == "normal" else value


MAPS = [name for name in modalities.names() if modalities.get(name).kind in ("image", "map")]
LARGE = ("rgb", "semseg", "canny_edge")


@pytest.mark.parametrize(("name", "height", "width"), [
    *((name, 1, 1) for name in MAPS), *((name, 1, 40) for name in MAPS),
    *((name, 4000, 5000) for name in LARGE),
])  # fmt: skip
def test_maps_of_one_pixel_and_of_20_megapixels_are_stored_cropped_and_rendered(
    name, height, width
) -> None:
    modality, value = modalities.get(name), of_size(name, height, width)
    assert modality.decode(modality.encode(value)).shape == value.shape
    crop = modality.crop(value, CropBox(0.0, 0.0, 1.0, 1.0, hflip=True), 64)
    assert crop.shape == (64, 64, *value.shape[2:])
    assert np.isfinite(crop).all()
    shown = modality.render(value)
    assert (shown.dtype, shown.shape) == (np.uint8, (height, width, 3))


def named(count: int) -> dict[str, Any]:
    """Boxes of as many classes, corners in either order."""
    return {"instances": [
        {"box": [0.9, 0.8, 0.1, 0.2], "class_name": f"class {number}", "score": 0.9}
        for number in range(count)
    ]}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [
    ("caption", ""), ("caption", "word " * 1000), ("caption", "x" * 10_000),
    ("det", boxes(0)), ("det", boxes(MANY)), ("det", named(MANY)),
    ("human_poses", people(0)), ("human_poses", people(MANY)),
    ("sam_instance", {"size": [9, 7], "instances": []}), ("sam_instance", {
        "size": [1, 1], "instances": [instance(np.ones((1, 1), bool), 0.9)] * MANY,
    }),
    ("metadata", {}), ("color_palette", {}), ("t5_caption", np.zeros((1, 8), np.float16)),
])  # fmt: skip
def test_nothing_and_hundreds_of_things_are_stored_cropped_and_rendered(name, value) -> None:
    modality = modalities.get(name)
    data = modality.encode(value)
    assert modality.encode(modality.decode(data)) == data
    crop = modality.crop(modality.decode(data), CropBox(0.1, 0.1, 0.8, 0.8), 32)
    for each in (value, crop):
        shown = modality.render(each)
        assert shown.dtype == np.uint8
        assert shown.shape[2:] == (3,)


def test_a_label_of_pieces_without_end_is_refused_in_a_moment() -> None:
    data = modalities.get("depth").encode(np.zeros((4, 4), np.float32))
    empty = struct.pack(">I", 0) + b"teXt" + struct.pack(">I", zlib.crc32(b"teXt"))
    with pytest.raises(ValueError, match="pieces of a few bytes without end"):
        modalities.get("depth").decode(data[:33] + empty * 200_000 + data[33:])


def test_depth_is_coloured_alike_in_parts() -> None:
    value = np.linspace(0, 1, 700 * 3, dtype=np.float32).reshape(700, 3)
    shown = modalities.get("depth").render(value)
    assert (shown[0, 0] == [250, 210, 60]).all()
    assert (shown[-1, -1] == [30, 15, 70]).all()
    assert np.abs(np.diff(shown[:, 1].astype(int), axis=0)).max() < 4


@pytest.mark.parametrize("text", ["word " * 200_000, "a" * 3_000_000, "\n" * 1_000_000])
def test_a_text_of_megabytes_is_drawn_in_a_moment(text: str) -> None:
    began = time.monotonic()
    assert modalities.get("caption").render(text).shape == (128, 128, 3)
    found = {"instances": [{"box": [0.0, 0.0, 1.0, 1.0], "class_name": text, "score": 1.0}]}
    assert modalities.get("det").render(found).shape == (128, 128, 3)
    assert ui.contact_sheet([[np.zeros((8, 8, 3), np.uint8)]], titles=[text]).width < 100
    assert time.monotonic() - began < 10
