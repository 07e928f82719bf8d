"""Grammars: whatever a model would like to write, what it may write can be read."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.fourm.conditions import LAST
from models.fourm.decoding import Decoding, draw
from models.fourm.generate import Generator
from models.fourm.grammar import (
    METADATA_LEVELS,
    Grammar,
    Rule,
    boxes,
    grammar_for,
)
from models.fourm.sampling import sample
from models.fourm.spec import EOS_ID
from tests.models.tiny_fourm import Grey, network, small_text, tokens
from tokenizers_vq.sequences import string_to_det, string_to_keypoints
from tokenizers_vq.text import TextTokenizer, train_text_tokenizer

ROWS = 4


@pytest.fixture(scope="module")
def small() -> TextTokenizer:
    return small_text()


@pytest.fixture(scope="module")
def wide() -> TextTokenizer:
    """With the bins that codes of poses and levels of colours need, and some words in pieces."""
    corpus = ["none human pose global shape camera"] * 3
    return train_text_tokenizer(corpus, class_names=("cube",), bins=512, vocab_size=2300)


def written(grammar: Grammar, vocab: int, length: int, seed: int, liked: list[int]) -> list[list]:
    """Sequences drawn from wild logits under a grammar, each through the end of the loop."""
    rng = np.random.default_rng(seed)
    state = grammar.start(ROWS, torch.device("cpu"))
    lines: list[list[int]] = [[] for _ in range(ROWS)]
    active = list(range(ROWS))
    for step in range(length):
        logits = torch.from_numpy(rng.normal(scale=30, size=(ROWS, vocab)).astype(np.float32))
        logits[:, [i for i in liked if i < vocab]] += 1e4
        mask = grammar.allowed(state, length - step)
        assert bool(mask.any(1).all())
        noise = torch.from_numpy(rng.uniform(0.01, 0.99, ROWS).astype(np.float32))[active]
        temperature, top_p = ((0.0, 0.0), (1.0, 0.9))[seed % 2]
        legal = logits[active].masked_fill(~mask, -torch.inf)
        ids, _ = sample(legal, noise, temperature, 0, top_p)
        for row, token in zip(active, ids.tolist(), strict=True):
            lines[row].append(token)
        kept = (ids != LAST).nonzero().squeeze(1)
        state = grammar.advance(state, ids).rows(kept)
        active = [active[i] for i in kept.tolist()]
        if not active:
            break
    return lines


def content(line: list[int], length: int) -> list[int]:
    """What lies before [EOS], which must be there once, with at most [S_2] behind it."""
    assert line.count(EOS_ID) == 1
    end = line.index(EOS_ID)
    assert line[end + 1 :] in ([], [LAST])
    assert len(line) <= length
    return line[:end]


def read_det(text: str, ids: list[int]) -> None:
    found = string_to_det(text, bins=8)["instances"]
    assert len(ids) % 5 == 0
    assert len(found) == len(ids) // 5
    assert {box["class_name"] for box in found} <= {"cube", "sphere"}


def read_palette(text: str, ids: list[int]) -> None:
    count, *levels = re.findall(r"v\d=(\d+)", text)
    assert re.fullmatch(r"v1=[1-7]( v0=\d+)+", text)
    assert len(levels) == 3 * int(count)
    assert max(map(int, levels)) <= 255


def read_metadata(text: str, ids: list[int]) -> None:
    pairs = re.findall(r"v1=(\d+) v0=(\d+)", text)
    assert len(pairs) * 2 == len(ids)
    kinds = [int(kind) for kind, _ in pairs]
    assert len(set(kinds)) == len(kinds)
    for kind, (_, value) in zip(kinds, pairs, strict=True):
        assert int(value) < METADATA_LEVELS[kind]


def read_poses(text: str, ids: list[int]) -> None:
    if text == "none":
        return
    number = r" v0=\d+"
    groups = {"pose": r"pose(?: v[01]=\d+){8}", "global": f"global(?:{number}){{9}}",
              "shape": f"shape(?:{number}){{10}}", "camera": f"camera(?:{number}){{3}}"}
    people = text.split("human ")[1:]
    assert people
    for person in people:
        corners = re.match(r"v0=(\d+) v1=(\d+) v2=(\d+) v3=(\d+) ", person)
        assert corners is not None
        x0, y0, x1, y1 = map(int, corners.groups())
        assert x0 <= x1
        assert y0 <= y1
        rest = person[corners.end() :]
        for pattern in groups.values():
            rest, found = re.subn(pattern, "", rest)
            assert found == 1
        assert not rest.strip()


def read_keypoints(text: str, ids: list[int]) -> None:
    people = string_to_keypoints(text)
    assert len(people) == text.split().count("human")
    assert (text == "none") == (not people)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), length=st.integers(1, 23),
       liked=st.lists(st.integers(0, 400), max_size=6))
def test_boxes_can_be_read_whatever_the_logits_are(
    small: TextTokenizer, seed: int, length: int, liked: list[int]
) -> None:
    grammar = grammar_for("det", small, small.vocab_size)
    for line in written(grammar, small.vocab_size, length, seed, liked):
        ids = content(line, length)
        read_det(small.decode(ids), ids)


@pytest.mark.parametrize(("name", "read", "length"), [
    ("color_palette", read_palette, 23),
    ("metadata", read_metadata, 40),
    ("human_poses", read_poses, 200),
    ("keypoints", read_keypoints, 120),
])
def test_other_sequences_can_be_read_whatever_the_logits_are(
    wide: TextTokenizer, name: str, read: Callable[[str, list[int]], None], length: int
) -> None:
    grammar = grammar_for(name, wide, wide.vocab_size)
    for seed in range(4):
        cut = grammar.shortest if seed == 3 else length
        for line in written(grammar, wide.vocab_size, cut, seed, [0, 5, 6]):
            ids = content(line, cut)
            read(wide.decode(ids), ids)


def test_every_true_sequence_of_boxes_is_allowed(small: TextTokenizer) -> None:
    ids = small.encode("v0=0 v1=1 v2=0 v3=7 cube v0=3 v1=3 v2=7 v3=4 sphere")
    grammar = grammar_for("det", small, small.vocab_size)
    state = grammar.start(1, torch.device("cpu"))
    for left, token in zip(range(12, 0, -1), [*ids, EOS_ID, LAST], strict=True):
        assert bool(grammar.allowed(state, left)[0, token])
        state = grammar.advance(state, torch.tensor([token]))


def test_every_fact_of_a_picture_is_allowed_once(wide: TextTokenizer) -> None:
    grammar = grammar_for("metadata", wide, wide.vocab_size)
    state, told = grammar.start(1, torch.device("cpu")), set()
    for left in range(40, 20, -2):
        legal = grammar.allowed(state, left)[0].nonzero()[:, 0].tolist()
        kinds = {token for token in legal if token not in (EOS_ID, LAST)}
        assert kinds
        assert not kinds & told
        told.add(min(kinds))
        state = grammar.advance(state, torch.tensor([min(kinds)]))
        value = int(grammar.allowed(state, left - 1)[0].nonzero()[0, 0])
        state = grammar.advance(state, torch.tensor([value]))
    assert len(told) == 10


def test_no_box_is_begun_that_does_not_fit(small: TextTokenizer) -> None:
    grammar = grammar_for("det", small, small.vocab_size)
    state = grammar.start(1, torch.device("cpu"))
    opening = small.coordinate_id(0, 3)
    assert bool(grammar.allowed(state, 6)[0, opening])
    assert grammar.allowed(state, 5)[0].nonzero().flatten().tolist() == [EOS_ID]


def test_what_has_no_grammar_or_no_room_is_refused(small: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="'caption' has no grammar; choose from det"):
        grammar_for("caption", small, 320)
    with pytest.raises(ValueError, match="8 coordinate bins, the grammar needs 21"):
        grammar_for("metadata", small, 320)
    with pytest.raises(ValueError, match="there are 100"):
        Grammar(boxes(small), 100)
    with pytest.raises(ValueError, match="lead to two states"):
        Grammar([Rule(0, 3, 2, 1), Rule(0, 4, 1, 2)], 9)
    model = network(small)
    with pytest.raises(ValueError, match="needs the grammar of det"):
        draw(model, {}, "det", Decoding(order="autoregressive", well_formed=True), [0])
    far = Grammar([Rule(0, 10, 1, 1), Rule(1, EOS_ID, 1, 2), Rule(2, LAST, 1, 3)], 320)
    assert far.shortest == 2


def test_a_model_writes_boxes_that_can_all_be_read(small: TextTokenizer) -> None:
    model = network(small)
    generator = Generator(model, {"rgb": Grey(colours=True)}, small, bf16=False)  # type: ignore
    bound = Decoding(order="autoregressive", temperature=2.0, guidance=1.5, well_formed=True)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (64, 64, 3), np.uint8) for _ in range(12)]
    found = generator.generate({"rgb": images}, ["det"], settings={"det": bound})["det"]
    first, second = (small.coordinate_id(axis, 0) for axis in (0, 1))
    begun = int(((found.tokens >= first) & (found.tokens < second)).sum())
    assert sum(len(value["instances"]) for value in found.values) == begun > 0


def test_a_grammar_leaves_rows_independent_of_their_batch(small: TextTokenizer) -> None:
    model, grammar = network(small), grammar_for("det", small, small.vocab_size)
    decoding = Decoding(order="autoregressive", temperature=2.0, well_formed=True)
    shown = {"tok_rgb@64": tokens(6)}
    drawn = draw(model, shown, "det", decoding, range(6), grammar=grammar)
    row = {"tok_rgb@64": tokens(6).rows(torch.tensor([4]))}
    alone = draw(model, row, "det", decoding, [4], grammar=grammar)
    assert torch.equal(drawn.ids[4], alone.ids[0])
