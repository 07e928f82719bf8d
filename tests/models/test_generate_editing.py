"""Generation from parts: kept tokens, texts with holes, in-painting, edits of boxes, and orders
and guidance beyond the released ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from models.fourm.conditions import FIRST, LAST, Shown, fill_holes
from models.fourm.decoding import Decoding, Step, draw
from models.fourm.editing import box_area, changed_boxes, pasted
from models.fourm.generate import Generator, Guide, Part, Tokens
from models.fourm.guidance import Branch
from models.fourm.model import FourM
from models.fourm.orders import halton_order
from models.fourm.presets import default_decoding
from models.fourm.schedules import token_schedule
from models.fourm.spec import EOS_ID, ModalitySpec
from tests.models.tiny_fourm import (
    CODES,
    GRID,
    Grey,
    grids,
    network,
    picture,
    tokens,
    words,
)
from tokenizers_vq.text import TextTokenizer

RGB, DEPTH = "tok_rgb@64", "tok_depth@64"
BOXES: dict[str, Any] = {
    "instances": [
        {"box": [0.0, 0.0, 0.25, 0.25], "class_name": "cube", "score": 1.0},
        {"box": [0.5, 0.5, 0.75, 0.75], "class_name": "sphere", "score": 1.0},
    ]
}


def test_the_halton_order_visits_every_cell_and_spreads_every_prefix() -> None:
    # By hand: (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9), (5/8, 7/9) on columns and rows of 4.
    assert halton_order(4, 4)[:5] == (6, 9, 3, 4, 14)
    order = halton_order(14, 14)
    assert sorted(order) == list(range(196))
    for count in (16, 48, 100):
        rows, columns = np.divmod(np.array(order[:count]), 14)
        quarters = np.bincount((rows // 7) * 2 + columns // 7, minlength=4)
        assert quarters.max() - quarters.min() <= count // 8


def test_halton_decodes_its_order_step_by_step(model: FourM) -> None:
    steps: list[Step] = []
    decoding = Decoding(order="halton", steps=4, schedule="linear")
    draw(model, {RGB: tokens(2)}, DEPTH, decoding, [0, 1], observe=steps.append)
    order = halton_order(4, 4)
    for number, step in enumerate(steps):
        assert step.positions.tolist() == [sorted(order[4 * number : 4 * number + 4])] * 2


def test_remasking_draws_accepted_tokens_again_but_never_given_ones(model: FourM) -> None:
    steps: list[Step] = []
    part = tokens(1, seed=3)
    given = Shown(part.values, torch.arange(GRID)[None] < 4)
    decoding = Decoding(order="roar", steps=3, schedule="linear", remask=0.5)
    shown = {RGB: tokens(1), DEPTH: given}
    drawn = draw(model, shown, DEPTH, decoding, [0], observe=steps.append)
    # 12 tokens in steps of 4: 4, then 4 + half of 4, then 4 + half of 8.
    assert [step.positions.shape[1] for step in steps] == [4, 6, 8]
    visits = torch.bincount(torch.cat([step.positions[0] for step in steps]), minlength=GRID)
    assert visits[:4].tolist() == [0] * 4
    assert int(visits[4:].min()) == 1
    assert int(visits.max()) > 1
    assert torch.equal(drawn.ids[0, :4], part.values[0, :4])
    again = draw(model, shown, DEPTH, decoding, [0])
    assert torch.equal(again.ids, drawn.ids)
    with pytest.raises(ValueError, match=r"remask is a share"):
        Decoding(order="roar", remask=1.0)


def test_rows_keep_their_own_given_tokens_and_come_out_as_alone(model: FourM) -> None:
    part = tokens(3, seed=1)
    visible = torch.stack([torch.arange(GRID) < 3, torch.arange(GRID) > 8, torch.ones(GRID) > 0])
    shown = {RGB: tokens(3), DEPTH: Shown(part.values, visible)}
    decoding = Decoding(order="maskgit", steps=8, temperature=1.0)
    drawn = draw(model, shown, DEPTH, decoding, [4, 5, 6], copies=2)
    kept = visible.repeat_interleave(2, 0)
    assert torch.equal(drawn.ids[kept], part.values.repeat_interleave(2, 0)[kept])
    row = {name: p.rows(torch.tensor([1])) for name, p in shown.items()}
    alone = draw(model, row, DEPTH, decoding, [5], copies=2)
    assert torch.equal(drawn.ids[2:4], alone.ids)
    assert not torch.equal(drawn.ids[2], drawn.ids[3])


def test_few_tokens_take_fewer_cosine_steps_where_so_many_do_not_exist() -> None:
    counts = token_schedule("cosine", 50, 3, fewer=True)
    assert sum(counts) == 3
    assert min(counts) >= 0


def test_branches_of_one_modality_are_weighted_in_one_forward_a_step(
    model: FourM, monkeypatch: pytest.MonkeyPatch
) -> None:
    red, blue = words(2, 210, 220, 230, 3), words(2, 240, 3)
    shown, steps, calls = {RGB: tokens(2)}, [], []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda batch: calls.append(1) or encode(batch))
    decoding = Decoding(order="halton", steps=2)
    branches = [Branch({"caption": red}, 2.0), Branch({"caption": blue}, -0.75)]
    draw(model, shown, DEPTH, decoding, [0, 1], branches=branches, observe=steps.append)
    assert len(calls) == len(steps) == 2
    base, first, second = steps[0].branches
    wanted = base + 2.0 * (first - base) - 0.75 * (second - base)
    assert torch.allclose(steps[0].logits, wanted, atol=1e-4)
    for conditions, branch in (({}, base), ({"caption": red}, first), ({"caption": blue}, second)):
        alone: list[Step] = []
        draw(model, {**shown, **conditions}, DEPTH, decoding, [0, 1], observe=alone.append)
        assert torch.allclose(alone[0].logits, branch, atol=1e-4)
    with pytest.raises(ValueError, match="tok_depth@64 cannot guide itself"):
        draw(model, shown, DEPTH, decoding, [0, 1], branches=[Branch({DEPTH: tokens(2)}, 1.0)])
    scaled = Decoding(order="halton", guidance=2.0)
    with pytest.raises(ValueError, match=r"exclude each other; set guidance=1.0"):
        draw(model, shown, DEPTH, scaled, [0, 1], branches=branches)


def test_holes_take_the_runs_that_follow_their_sentinels() -> None:
    given = words(1, 300, FIRST, 301, LAST, EOS_ID)
    ids = torch.tensor([[250, 251, LAST, 252, 0, 0]])
    runs = Shown(ids, torch.tensor([[True] * 4 + [False] * 2]))
    filled, sure = fill_holes(given, runs, torch.full((1, 6), 0.5), 8)
    assert filled.values[0][filled.visible[0]].tolist() == [300, 250, 251, 301, 252, EOS_ID]
    assert sure[0, :6].tolist() == [1.0, 0.5, 0.5, 1.0, 0.5, 1.0]
    short, _ = fill_holes(given, runs, torch.full((1, 6), 0.5), 3)
    assert short.values[0].tolist() == [300, 250, 251]


def test_a_text_with_holes_keeps_its_words(generator: Generator) -> None:
    given = Part("a red ___ left ___")
    found = generator.generate({"rgb": picture(), "caption": given}, ["caption"], num_samples=3)
    for sample in found["caption"].samples[0]:
        assert sample.startswith("a red")
        assert "left" in sample
    shown = generator.show({"caption": [given]})["caption"]
    assert shown.holes.tolist() == [2]
    assert int(shown.values[0, -1]) == EOS_ID
    with pytest.raises(ValueError, match="has holes, written ___"):
        generator.generate({"caption": Part("a red cube")}, ["caption"])


def test_a_part_of_a_picture_is_seen_in_part(generator: Generator) -> None:
    mask = np.zeros((64, 64), bool)
    mask[:32] = True
    mask[32:40, :20] = True  # half a token is none
    as_pixels = generator.show({"rgb": [Part(picture(), mask)]})
    as_tokens = generator.show({"rgb": [Part(picture(), mask)]}, ["rgb"])
    for shown, name in ((as_pixels, "rgb@64"), (as_tokens, RGB)):
        assert list(shown) == [name]
        assert shown[name].visible[0].tolist() == [True] * 8 + [False] * 8
    with pytest.raises(ValueError, match=r"multiples of 4, not a mask of shape \(30, 64\)"):
        generator.show({"rgb": [Part(picture(), np.ones((30, 64), bool))]})


def test_inpainting_changes_the_area_and_nothing_else(generator: Generator) -> None:
    pictures, area = [picture(1), picture(2)], np.zeros((64, 64), bool)
    area[16:32, 16:40] = True
    found = generator.inpaint("rgb", pictures, area, {"caption": ["a red cube"] * 2})
    for before, after in zip(pictures, found.values, strict=True):
        assert np.array_equal(after[:16], before[:16])
        assert np.array_equal(after[16:32, 48:], before[16:32, 48:])
        assert not np.array_equal(after[16:32, 16:48], before[16:32, 16:48])
    alone = generator.inpaint("rgb", pictures[1], area, {"caption": "a red cube"}, seeds=[1])
    assert np.array_equal(alone.value, found.values[1])
    raw = generator.inpaint("rgb", pictures[1], area, {"caption": "a red cube"}, paste=False)
    kept = Grey(colours=True).encode_values(pictures[1:])[0]
    outside = np.setdiff1d(np.arange(GRID), [5, 6])
    assert np.array_equal(raw.tokens[0][outside], kept[outside])


def test_areas_of_boxes_cover_what_they_touch() -> None:
    assert np.argwhere(box_area([[0.3, 0.0, 0.5, 0.2]], 4)).tolist() == [[0, 1]]
    assert box_area([[0.3, 0.0, 0.5, 0.2]], 4, margin=0.1).sum() == 6
    assert box_area([[1.0, 1.0, 1.0, 1.0]], 4).sum() == 1
    assert not box_area([], 4).any()
    with pytest.raises(ValueError, match=r"in 0..1, not \[0.5, 0, 0.2, 1\]"):
        box_area([[0.5, 0, 0.2, 1]], 4)


def test_changed_boxes_are_those_that_one_side_lacks() -> None:
    cube, sphere = BOXES["instances"]
    moved = {**cube, "box": [0.5, 0.0, 0.75, 0.25], "score": 0.3}
    after = {"instances": [{**sphere, "score": 0.1}, moved]}
    assert changed_boxes(BOXES, after) == [[0.0, 0.0, 0.25, 0.25], [0.5, 0.0, 0.75, 0.25]]
    assert changed_boxes(BOXES, BOXES) == []
    assert changed_boxes({"instances": [cube, cube]}, {"instances": [cube]}) == [cube["box"]]


def test_pasting_needs_equal_shapes() -> None:
    with pytest.raises(ValueError, match="the original"):
        pasted(np.zeros((4, 4)), np.zeros((8, 8)), np.ones((2, 2), bool))


def test_moving_a_box_redraws_where_it_was_and_where_it_goes(generator: Generator) -> None:
    cube, sphere = BOXES["instances"]
    after = {"instances": [{**cube, "box": [0.75, 0.0, 1.0, 0.25]}, sphere]}
    before = picture(5)
    made = generator.edit_boxes(before, BOXES, after).value
    cells = (made != before).reshape(4, 16, 4, 16, 3).any((1, 3, 4))
    assert {tuple(cell) for cell in np.argwhere(cells).tolist()} == {(0, 0), (0, 3)}
    same = generator.edit_boxes([before], [BOXES], [BOXES])
    assert np.array_equal(same.value, before)
    with pytest.raises(ValueError, match="of one length"):
        generator.edit_boxes([before], [BOXES, BOXES], [after])


def test_guides_steer_and_take_the_place_of_the_scale(generator: Generator) -> None:
    plain = generator.generate({"rgb": picture()}, ["depth"])["depth"]
    guides = [Guide({"caption": "a red cube"}, 6.0), Guide({"caption": ["a sphere"]}, -2.0)]
    guided = generator.generate({"rgb": picture()}, ["depth"], guides=guides, num_samples=2)
    assert guided["depth"].tokens.shape == (2, GRID)
    assert not np.array_equal(guided["depth"].tokens[0], plain.tokens[0])
    twice = [Guide({"caption": ["a red cube"] * 2}, 6.0),
             Guide({"caption": ["a sphere"] * 2}, -2.0)]  # fmt: skip
    both = generator.generate({"rgb": [picture(9), picture()]}, ["depth", "caption"], guides=twice,
                              seeds=[7, 0], num_samples=2)  # fmt: skip
    assert np.array_equal(both["depth"].tokens[2:], guided["depth"].tokens)
    with pytest.raises(ValueError, match="of one length"):
        generator.generate({"rgb": picture()}, ["depth"], guides=twice)


def test_one_value_is_a_batch_of_one(generator: Generator) -> None:
    one = generator.generate({"rgb": picture()}, ["depth", "caption"])
    many = generator.generate({"rgb": [picture(), picture(1)]}, ["depth", "caption"])
    stacked = generator.generate({"rgb": np.stack([picture(), picture(1)])}, ["depth"])
    assert np.array_equal(one["depth"].value, many["depth"].values[0])
    assert one["caption"].value == many["caption"].values[0]
    assert np.array_equal(stacked["depth"].tokens, many["depth"].tokens)
    assert generator.generate({"caption": "a red cube"}, "depth")["depth"].value.shape == (64, 64)
    boxed = generator.generate({"det": BOXES}, ["rgb"], seeds=[3])["rgb"]
    assert boxed.value.shape == (64, 64, 3)
    with pytest.raises(ValueError, match="there are 2 rows"):
        _ = many["depth"].value


@pytest.fixture(scope="module")
def upscaler(text: TextTokenizer) -> Generator:
    pixels = ModalitySpec(name="rgb@64", kind="pixels", max_tokens=GRID, is_target=False)
    words_ = ModalitySpec(name="caption", kind="seq", max_tokens=12, vocab_size=text.vocab_size)
    fine = grids(128, "rgb", "depth")
    model = network(text, pixels, words_, *grids(64, "rgb", "depth"), *fine)
    coarse = {"rgb": Grey(colours=True), "depth": Grey()}
    return Generator(model, coarse, text, bf16=False)  # type: ignore[arg-type]


def test_a_second_model_makes_the_same_at_a_higher_resolution(
    generator: Generator, upscaler: Generator
) -> None:
    pictures = [picture(1), picture(2)]
    low = generator.generate({"rgb": pictures}, ["depth", "caption"], num_samples=2)
    high = upscaler.upscale(low, {"rgb": pictures})
    assert list(high) == ["depth"]
    assert high["depth"].tokens.shape == (4, 64)
    assert [len(group) for group in high["depth"].samples] == [2, 2]
    assert high["depth"].values[0].shape == (128, 128)
    # Sample by sample: what stands beside it does not matter.
    row = generator.generate({"rgb": pictures[1]}, ["depth", "caption"], seeds=[1],
                             num_samples=2)  # fmt: skip
    alone = upscaler.upscale(row, {"rgb": pictures[1]}, seeds=[2, 3])
    assert np.array_equal(alone["depth"].tokens, high["depth"].tokens[2:])
    with pytest.raises(ValueError, match="cannot refine rgb; choose from depth"):
        upscaler.upscale(low, {"rgb": pictures}, ["rgb"])
    with pytest.raises(ValueError, match="choose from nothing"):
        generator.upscale(low)


def test_tokens_stand_for_values(generator: Generator) -> None:
    ids = Grey(colours=True).encode_values([picture()])[0]
    shown = generator.show({"rgb": [Tokens(ids), None]})
    assert list(shown) == [RGB]
    assert shown[RGB].values[0].tolist() == ids.tolist()
    with pytest.raises(ValueError, match=f"lie in 0..{CODES - 1}"):
        generator.show({"rgb": [Tokens(ids + 50)]})


SCALE = {"top_p": 0.8, "guidance": 2.0}
COOL = {"schedule": "linear", "temperature_schedule": "onex:0.5:0.5", "order": "roar", **SCALE}
ONE = {"order": "roar", "steps": 1, "schedule": "linear", "temperature": 0.01, **SCALE}
WORDS = {"order": "autoregressive", "top_p": 0.8, "show_opening": True}


@pytest.mark.parametrize(("target", "given", "expected"), [
    ("tok_clip@224", ["rgb@224"], ONE),
    ("tok_depth@224", ["caption", "tok_rgb@224"], ONE),
    ("tok_dinov2@224", ["rgb@224"], ONE),
    ("tok_clip@224", ["caption"], {**COOL, "steps": 50, "temperature": 5.0, "guidance": 3.0}),
    ("tok_semseg@224", ["caption"], {**COOL, "steps": 8, "temperature": 3.0}),
    ("tok_rgb@224", ["tok_depth@224"], {**COOL, "steps": 25, "temperature": 3.0}),
    ("tok_imagebind@224", ["caption"], {**ONE, "steps": 8}),
    ("tok_dinov2_global", ["rgb@224"], {**ONE, "temperature": 0.1, "guidance": 1.0}),
    ("tok_rgb@448", ["rgb@224", "tok_rgb@224"], {"order": "maskgit", "steps": 8, **SCALE}),
    ("caption", ["rgb@224"], {**WORDS, "temperature": 0.3}),
    ("det", [], {**WORDS, "temperature": 0.3}),
    ("color_palette", [], {**WORDS, "temperature": 0.1}),
    ("sam_instance", [], {**WORDS, "temperature": 0.01}),
])
def test_presets_are_the_released_samplers(
    target: str, given: list[str], expected: dict[str, Any]
) -> None:
    seq = expected["order"] == "autoregressive"
    spec = ModalitySpec(name=target, kind="seq" if seq else "img", max_tokens=196, vocab_size=9)
    assert default_decoding(spec, given) == Decoding(**expected)
