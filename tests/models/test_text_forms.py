"""Text forms of the catalogue: what is written reads back, whatever is read makes a value."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import modalities
from models.modalities.human_poses import RELEASED_TEXT
from models.modalities.sam_instance import PATCH
from tests.tasks.every_modality import value_of
from tokenizers_vq.sequences.form import Page, TextForm, seed_of
from tokenizers_vq.sequences.metadata import FIELDS
from tokenizers_vq.text import TextTokenizer, train_text_tokenizer

TOLD = ("caption", "color_palette", "det", "human_poses", "metadata", "sam_instance")
WORDS = {word for name in TOLD for word in getattr(modalities.text_form(name), "words", ())}


class Masks:
    """Sixteen codes of a mask: how full each of 4 x 4 cells is."""

    vocab_size = 8

    def encode_values(self, values: list[np.ndarray]) -> np.ndarray:
        cells = np.stack(values).reshape(len(values), 4, PATCH // 4, 4, PATCH // 4).mean((2, 4))
        return np.rint(cells * 7).astype(np.uint16).reshape(len(values), 16)

    def decode_tokens(self, tokens: np.ndarray) -> list[np.ndarray]:
        assert tokens.max() < self.vocab_size
        cells = (np.asarray(tokens).reshape(-1, 4, 4) > 3).astype(np.uint8)
        return list(cells.repeat(PATCH // 4, 1).repeat(PATCH // 4, 2))


def tokenizer(bins: int) -> TextTokenizer:
    return train_text_tokenizer(
        ["a cube of 0 1 2 3 4 5 6 7 8 9 cm"] * 3, class_names=["cube"], bins=bins,
        vocab_size=4 * bins + 400, words=WORDS,
    )  # fmt: skip


FEW, MANY = tokenizer(24), tokenizer(1000)


def form_of(name: str) -> TextForm:
    found = modalities.text_form(name)
    assert found is not None
    return found


def page_of(text: TextTokenizer, seed: int = 0, size: int = 224) -> Page:
    return Page(bins=text.bins, size=size, codes=Masks(), seed=seed)


def test_all_sequences_but_embeddings_have_a_text_form() -> None:
    kinds = {name: modalities.get(name).kind for name in modalities.names()}
    told = {name for name, kind in kinds.items() if kind == "sequence"} - {"t5_caption"}
    assert told == set(TOLD) == {name for name in kinds if modalities.text_form(name)}
    assert modalities.is_embedded("t5_caption")
    assert modalities.text_form("no such modality") is None


@pytest.mark.parametrize("text", [FEW, MANY], ids=["24 bins", "1000 bins"])
@pytest.mark.parametrize("name", TOLD)
def test_what_is_written_survives_the_ids_and_writes_the_same_again(
    name: str, text: TextTokenizer
) -> None:
    """Levels are rounded once; from then on a value is a fixed point."""
    form, page = form_of(name), page_of(text)
    line = form.write(value_of(name, 3), page)
    ids = text.encode(line)
    assert 1 not in ids
    value = form.read(text.decode(ids), page)
    assert modalities.get(name).encode(value)
    if name != "sam_instance":  # which points are asked for differs, and the masks are approximate
        assert form.write(value, page).split() == line.split()
        assert form.read(form.write(value, page), page) == value


@pytest.mark.parametrize("text", [FEW, MANY], ids=["24 bins", "1000 bins"])
def test_instances_come_back_where_they_were(text: TextTokenizer) -> None:
    form, page, given_value = form_of("sam_instance"), page_of(text), value_of("sam_instance", 0)
    value = form.read(form.write(given_value, page), page)
    assert value["size"] == [224, 224]
    # The picture of 48 x 32 fills the square page; 23 steps leave 224 / 23 px to each.
    want = np.array([4 * 224 / 48, 2 * 7, 44 * 224 / 48, 30 * 7])
    boxes = [np.array(each["box"]) for each in value["instances"]]
    assert min(np.abs(box - want).max() for box in boxes) <= (1 if text is MANY else 224 / 23)
    assert all(each["mask"].all() for each in value["instances"])
    for each in value["instances"]:
        left, top, right, bottom = each["box"]
        assert each["mask"].shape == (bottom - top, right - left)


def test_an_empty_value_has_a_text_that_reads_as_empty() -> None:
    empty = {
        "caption": "", "color_palette": {}, "det": {"instances": []}, "human_poses": {"humans": []},
        "metadata": {}, "sam_instance": {"size": [32, 32], "instances": []},
    }  # fmt: skip
    for name, value in empty.items():
        page = page_of(MANY, size=32)
        line = form_of(name).write(value, page)
        assert form_of(name).read(MANY.decode(MANY.encode(line)), page) == value


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(TOLD),
    ids=st.lists(st.integers(0, MANY.vocab_size - 1) | st.integers(204, 900), max_size=60),
)
def test_any_ids_read_as_a_value_that_can_be_stored_and_shown(name: str, ids: list[int]) -> None:
    value = form_of(name).read(MANY.decode(ids), page_of(MANY, size=32))
    modality = modalities.get(name)
    modality.decode(modality.encode(value))
    assert modality.render(value).dtype == np.uint8


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), cut=st.integers(0, 200), name=st.sampled_from(TOLD))
def test_a_text_that_is_cut_anywhere_reads_as_what_is_complete(
    seed: int, cut: int, name: str
) -> None:
    form, page = form_of(name), page_of(MANY, seed, 32)
    words = form.write(value_of(name, seed), page).split()
    value = form.read(" ".join(words[:cut]), page)
    modalities.get(name).decode(modalities.get(name).encode(value))


def test_which_palette_is_told_depends_on_sample_and_crop_alone() -> None:
    form, value = form_of("color_palette"), value_of("color_palette", 0)
    seeds = [seed_of("color_palette", "000001", crop) for crop in range(30)]
    lines = [form.write(value, page_of(MANY, seed)) for seed in seeds]
    assert lines == [form.write(value, page_of(MANY, seed)) for seed in seeds]
    assert {line.split()[0] for line in lines} == {f"v1={n}" for n in range(1, 8)}


def test_codes_of_instances_need_their_tokenizer_and_boxes_a_least_score() -> None:
    value = value_of("sam_instance", 0)
    with pytest.raises(ValueError, match="its tokenizer is missing"):
        form_of("sam_instance").write(value, replace(page_of(MANY, size=32), codes=None))
    boxes = value_of("det", 0)
    boxes["instances"][0]["score"] = 0.5
    assert form_of("det").write(boxes, page_of(MANY)) == ""
    assert form_of("det").write(boxes, replace(page_of(MANY), min_score=0.4)).endswith("cube")


def test_the_released_text_of_poses_stays_readable_and_writable() -> None:
    person = {"box": [0.0, 0.0, 1.0, 1.0], "pose": list(range(8)), "global": [0.0] * 9,
              "camera": [1.0, 2.0, 3.0], "shape": [0.5] * 10}  # fmt: skip
    page = page_of(MANY)
    line = RELEASED_TEXT.write({"people": [person]}, page)
    assert len(line.split()) == 39
    (back,) = RELEASED_TEXT.read(line, page)["people"]
    assert back["pose"] == person["pose"]
    assert np.allclose(back["shape"], person["shape"], atol=6 / 999)
    with pytest.raises(ValueError, match="at least 1000 coordinate bins"):
        RELEASED_TEXT.check_bins("human_poses", 64)


@settings(deadline=None)
@given(share=st.floats(0, 1))
def test_metadata_tells_all_levels_of_a_quality_with_the_fewest_bins_that_it_takes(share) -> None:
    form, field = form_of("metadata"), FIELDS["brightness"]
    page = Page(bins=form.min_bins)
    found = form.read(form.write({"brightness": 255 * share}, page), page)
    assert field.level(found["brightness"]) == field.level(255 * share)
