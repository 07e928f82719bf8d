"""Generation from files to files, and what wrong names and files get."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infra.store import Store
from models.fourm.generate import Generator
from models.fourm.spec import ModalitySpec
from tasks import generate as task
from tasks.generate import How
from tasks.generate_files import read_input, write_value
from tests.models import tiny_fourm
from tests.tasks.tiny import SIDE, Coarse, network
from tokenizers_vq.text import train_text_tokenizer


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    text = train_text_tokenizer(["a red cube"] * 3, class_names=("cube",), bins=16, vocab_size=320)
    names = ("rgb", "depth", "normal", "semseg")
    generator = Generator(network(text), {n: Coarse(n) for n in names}, text, bf16=False)  # type: ignore
    monkeypatch.setattr(task, "load_generator", lambda store, run: generator)
    return Store(str(tmp_path / "store"))


@pytest.fixture
def photo(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    return str(tmp_path / "photo.jpg")


def test_a_photo_becomes_pictures_values_and_text(store: Store, photo: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    targets = ["depth", "normal", "semseg", "det", "caption", "rgb"]
    files = task.generate(store, "main", {"rgb": photo}, targets, out)
    names = {path.name for path in files}
    assert {"depth.png", "depth.value.png", "det.json", "caption.txt", "rgb.png"} <= names
    assert Image.open(out / "depth.png").size == (SIDE, SIDE)
    assert "instances" in json.loads((out / "det.json").read_text())


def test_samples_are_different_files_and_repeat_with_the_seed(store: Store, tmp_path: Path) -> None:
    first = task.generate(store, "main", {"caption": "a red cube"}, ["rgb"], tmp_path / "a",
                          How(samples=2, guidance=1.0))  # fmt: skip
    again = task.generate(store, "main", {"caption": "a red cube"}, ["rgb"], tmp_path / "b",
                          How(samples=2, guidance=1.0))  # fmt: skip
    assert [path.name for path in first] == ["rgb-0.png", "rgb-1.png"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert first[0].read_bytes() != first[1].read_bytes()


def test_boxes_are_read_from_text_and_from_a_file(store: Store, tmp_path: Path) -> None:
    boxes = json.dumps(
        {"instances": [{"box": [0.1, 0.1, 0.5, 0.5], "class_name": "cube", "score": 1.0}]}
    )
    (tmp_path / "boxes.json").write_text(boxes)
    from_text = task.generate(store, "main", {"det": boxes}, ["rgb"], tmp_path / "a")
    path = str(tmp_path / "boxes.json")
    from_file = task.generate(store, "main", {"det": path}, ["rgb"], tmp_path / "b")
    assert from_text[0].read_bytes() == from_file[0].read_bytes()


def test_given_boxes_are_all_told_however_sure_a_model_was_of_them(
    store: Store, tmp_path: Path
) -> None:
    unsure = {"instances": [{"box": [0.0, 0.0, 0.5, 0.5], "class_name": "cube", "score": 0.2}]}
    write_value(tmp_path, "det", "det", unsure, None)
    generator = task.load_generator(store, "main")
    given = read_input(generator, "det", str(tmp_path / "det.json"))
    for boxes in (given, unsure):  # from a file, and from who calls `Generator.generate`
        assert generator.written("det", boxes).endswith("cube")


def test_a_part_of_a_photo_is_redrawn_and_the_rest_is_the_photo(
    store: Store, photo: str, tmp_path: Path
) -> None:
    def redrawn(name: str, how: str, **more: str) -> np.ndarray:
        given = {"rgb": photo, **more}
        [path] = task.generate(store, "main", given, ["rgb"], tmp_path / name, How(redraw=how))
        return np.asarray(Image.open(path))

    before = read_input(task.load_generator(store, "main"), "rgb", photo)
    by_box = redrawn("box", "0.5,0,0.75,0.25", caption="a red cube")
    cells = (by_box != before).reshape(4, 16, 4, 16, 3).any((1, 3, 4))
    assert np.argwhere(cells).tolist() == [[0, 2]]

    white = np.zeros((SIDE, SIDE, 3), np.uint8)
    white[:16, 32:48] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    by_mask = redrawn("mask", str(tmp_path / "mask.png"), caption="a red cube")
    assert np.array_equal(by_mask, by_box)

    def boxes(*corners: list[float]) -> str:
        return json.dumps({"instances": [
            {"box": box, "class_name": "cube", "score": 1.0} for box in corners
        ]})  # fmt: skip

    there = [0.0, 0.75, 0.25, 1.0]
    (tmp_path / "before.json").write_text(boxes(there, [0.0, 0.0, 0.25, 0.25]))
    by_edit = redrawn("edit", str(tmp_path / "before.json"), det=boxes(there))
    cells = (by_edit != before).reshape(4, 16, 4, 16, 3).any((1, 3, 4))
    assert np.argwhere(cells).tolist() == [[0, 0]]


def test_an_area_that_makes_no_sense_is_refused_before_anything_is_written(
    store: Store, photo: str, tmp_path: Path
) -> None:
    def refused(inputs: dict[str, str], targets: list[str], redraw: str, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            task.generate(store, "main", inputs, targets, tmp_path / "out", How(redraw=redraw))

    refused({"rgb": photo}, ["depth"], "0,0,1,1", "needs rgb as a whole input and as only target")
    refused({"rgb": photo}, ["rgb"], "0.9,0,0.1,1", r"'0.9,0,0.1,1': a box is xmin")
    refused({"rgb": photo}, ["rgb"], "a,b,c,d", "could not convert string to float")
    refused({"rgb": photo}, ["rgb"], '{"instances": []}', "the boxes after the edit")
    refused({"rgb": photo}, ["rgb"], "nothing.png", "cannot be read as a mask picture")
    refused({"rgb": photo}, ["rgb"], "0,0,2", "a box is xmin,ymin,xmax,ymax in 0..1")
    assert not (tmp_path / "out").exists()


def test_a_known_part_is_kept_and_the_rest_is_generated(
    store: Store, photo: str, tmp_path: Path
) -> None:
    generator = task.load_generator(store, "main")
    whole = read_input(generator, "rgb", photo)
    [path] = task.generate(store, "main", {"rgb": photo}, ["rgb"], tmp_path / "a",
                           How(known={"rgb": "0,0,1,0.5"}))  # fmt: skip
    made = np.asarray(Image.open(path))
    codes = [Coarse("rgb").encode_values([value])[0].reshape(4, 4) for value in (made, whole)]
    assert np.array_equal(codes[0][:2], codes[1][:2])
    assert not np.array_equal(codes[0][2:], codes[1][2:])
    # As a mere condition the part is what the model sees.
    parts = [task.generate(store, "main", {"rgb": photo}, ["depth"], tmp_path / name, how)
             for name, how in (("b", How(known={"rgb": "0,0,1,0.5"})), ("c", How()))]  # fmt: skip
    assert parts[0][0].read_bytes() != parts[1][0].read_bytes()


def test_a_caption_with_holes_keeps_its_words(store: Store, photo: str, tmp_path: Path) -> None:
    [path] = task.generate(store, "main", {"rgb": photo, "caption": "a red ___"}, ["caption"],
                           tmp_path / "a")  # fmt: skip
    assert path.read_text().startswith("a red")


def test_samples_are_combined_into_one_result_where_asked(
    store: Store, photo: str, tmp_path: Path
) -> None:
    def depths(name: str, how: How) -> list[np.ndarray]:
        files = task.generate(store, "main", {"rgb": photo}, ["depth"], tmp_path / name, how)
        decode = task_modality("depth").decode
        return [decode(file.read_bytes()) for file in files if ".value." in file.name]

    hot = {"*": {"temperature": 5.0, "steps": 4}}
    apart = depths("apart", How(samples=3, decoding=hot))
    [together] = depths("together", How(samples=3, decoding=hot, combine=True))
    assert len(apart) == 3
    assert np.abs(together - np.mean(apart, 0)).max() < 1e-3


def task_modality(name: str):
    from models import modalities

    return modalities.get(name)


def test_guides_pull_and_push_without_any_plain_condition(store: Store, tmp_path: Path) -> None:
    def made(name: str, *guides: tuple[dict[str, str], float]) -> bytes:
        [path] = task.generate(store, "main", {}, ["rgb"], tmp_path / name, How(guides=guides))
        return path.read_bytes()

    towards, away = ({"caption": "a red cube"}, 8.0), ({"caption": "a a a"}, -8.0)
    assert made("a", towards) == made("b", towards) != made("c", towards, away)


def test_presets_and_changes_decide_how_a_target_is_decoded(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = task.load_generator(store, "main")

    def settings(how: How) -> dict:
        return task._settings(generator, ["caption"], ["rgb", "det"], how)

    plain, released = settings(How())["rgb"], settings(How(preset="released"))["rgb"]
    assert (plain.guidance, released.guidance, plain.order) == (1.0, 2.0, "roar")
    assert settings(How(guidance=3.0))["rgb"].guidance == 3.0
    assert settings(How())["det"].well_formed
    halton = settings(How(preset="halton"))
    assert (halton["rgb"].order, halton["rgb"].steps) == ("halton", 16)
    assert halton["det"].order == "autoregressive"
    assert settings(How(preset="greedy"))["det"].temperature == 0
    both = settings(How(decoding={"*": {"order": "maskgit", "top_p": 0.5}, "rgb": {"steps": 3}}))
    assert (both["rgb"].order, both["rgb"].steps, both["rgb"].top_p) == ("maskgit", 3, 0.5)
    assert (both["det"].order, both["det"].top_p) == ("autoregressive", 0.5)
    with pytest.raises(ValueError, match="det is a sequence: steps mean nothing for it"):
        settings(How(decoding={"det": {"steps": 3}}))
    with pytest.raises(ValueError, match="unknown preset 'best'; choose from plain, released"):
        settings(How(preset="best"))  # type: ignore[arg-type]


def test_a_second_run_refines_what_the_first_made(
    store: Store, photo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tiny_fourm.small_text()
    pixels = ModalitySpec(name="rgb@64", kind="pixels", max_tokens=16, is_target=False)
    grey = {"rgb": tiny_fourm.Grey(colours=True), "depth": tiny_fourm.Grey()}
    low = tiny_fourm.network(text, pixels, *tiny_fourm.grids(64, "rgb", "depth"))
    fine = tiny_fourm.network(text, pixels, *tiny_fourm.grids(64, "rgb", "depth"),
                              *tiny_fourm.grids(128, "depth"))  # fmt: skip
    found = {name: Generator(model, grey, text, bf16=False)  # type: ignore[arg-type]
             for name, model in (("low", low), ("fine", fine))}  # fmt: skip
    monkeypatch.setattr(task, "load_generator", lambda store, run: found[run])
    files = task.generate(store, "low", {"rgb": photo}, ["depth"], tmp_path / "out",
                          How(upscale="fine", samples=2))  # fmt: skip
    sizes = {Image.open(file).size for file in files if file.name.startswith("depth-")}
    assert sizes == {(128, 128)}
    with pytest.raises(ValueError, match="run 'low' refines nothing, none of depth"):
        task.generate(store, "fine", {"rgb": photo}, ["depth"], tmp_path / "no",
                      How(upscale="low"))  # fmt: skip


def test_settings_of_what_is_not_there_are_refused(
    store: Store, photo: str, tmp_path: Path
) -> None:
    def refused(how: How, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            task.generate(store, "main", {"rgb": photo}, ["depth"], tmp_path / "out", how)

    refused(How(decoding={"rgb": {}}), r"decoding names 'rgb'; choose from depth, \*")
    refused(How(known={"depth": "0,0,1,1"}), "known names 'depth'; choose from rgb")
    refused(How(known={"rgb": "0,0,2,1"}), "the known part of rgb, '0,0,2,1': a box is xmin")
    refused(How(known={"rgb": "no.png"}), "'no.png' cannot be read as a mask picture")
    refused(How(guides=[({"sound": "x"}, 1.0)]), "'sound' cannot be an input")
    with pytest.raises(ValueError, match="guides take the place of a guidance scale"):
        How(guides=[({"caption": "x"}, 1.0)], guidance=2.0)
    assert not (tmp_path / "out").exists()


def test_a_photo_is_seen_upright_as_downloaded_ones_are(store: Store, tmp_path: Path) -> None:
    """A camera held upright stores its rows as they come, and notes which side is up."""
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[: SIDE // 2] = 255
    turned, path = Image.Exif(), tmp_path / "photo.png"
    turned[0x0112] = 6
    Image.fromarray(pixels).save(path, exif=turned)
    seen = read_input(task.load_generator(store, "main"), "rgb", str(path))
    assert np.array_equal(seen, np.rot90(pixels, -1))


def test_what_does_not_exist_is_one_sentence_with_the_choices(
    store: Store, photo: str, tmp_path: Path
) -> None:
    def refused(inputs: dict[str, str], targets: list[str], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            task.generate(store, "main", inputs, targets, tmp_path / "out")

    refused({"rgb": photo}, ["edges"], "'edges' cannot be generated; choose from caption, depth")
    refused({"sound": photo}, ["depth"], "'sound' cannot be an input; choose from caption, depth")
    refused({"rgb": str(tmp_path / "no.jpg")}, ["depth"], "cannot be read as rgb")
    refused({"det": '{"boxes": []}'}, ["rgb"], "cannot be read as det")
    refused({"caption": "no.txt"}, ["rgb"], "'no.txt' cannot be read as caption")
    (tmp_path / "odd.txt").write_bytes(b"\xff\xfe")
    refused({"caption": f"{tmp_path}/odd.txt"}, ["rgb"], "odd.txt' cannot be read as caption")
    refused({}, ["rgb"], "nothing to start from; choose from")
    assert not (tmp_path / "out").exists()


def test_results_that_could_not_be_written_are_not_generated(
    store: Store, photo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "_generated", lambda *_: pytest.fail("generated"))
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match=r"nothing can be written to .*out: .*out is no folder"):
        task.generate(store, "main", {"rgb": photo}, ["depth"], tmp_path / "out")


def test_a_run_that_does_not_exist_names_those_that_do(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(ValueError, match="run `fourm train` first"):
        task.load_generator(store, "main")
    store.write(f"runs/first/{task.MODEL}/config.json", b"{}")
    with pytest.raises(ValueError, match="there are first"):
        task.load_generator(store, "main")
    assert task.only_run(store) == "first"
