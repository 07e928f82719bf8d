"""Generation: schedules, sampling, the decode loop, and values out of values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from models.fourm.conditions import LAST, Context, Shown, gather_inputs, side_by_side
from models.fourm.decoding import Decoding, Drawn, Step, as_condition, draw
from models.fourm.ensemble import combine, vote_boxes
from models.fourm.generate import Generator, Tokens, read_boxes
from models.fourm.guidance import Branch
from models.fourm.model import FourM
from models.fourm.orders import to_redraw
from models.fourm.sampling import filtered, sample, uniform
from models.fourm.schedules import temperature_schedule, token_schedule
from tests.models.tiny_fourm import GRID, Grey, words
from tests.models.tiny_fourm import tokens as grid
from tokenizers_vq.text import TextTokenizer


@pytest.mark.parametrize(
    ("kind", "steps", "tokens", "expected"),
    [
        ("cosine", 5, 16, [2, 4, 5, 4, 1]),
        ("cosine", 8, 196, [7, 21, 32, 38, 38, 32, 21, 7]),
        ("linear", 5, 16, [4, 3, 3, 3, 3]),
        ("linear", 20, 16, [1] * 16),
    ],
)
def test_token_schedules_are_those_of_the_released_models(
    kind: str, steps: int, tokens: int, expected: list[int]
) -> None:
    assert token_schedule(kind, steps, tokens) == expected
    assert token_schedule(kind, steps, tokens, fewer=True) == expected


def test_temperature_schedules_are_those_of_the_released_models() -> None:
    counts = token_schedule("cosine", 8, 196)
    onex = [4.83928571, 3.56176151, 2.59690743, 1.8238914, 1.22614094, 0.80829252, 0.57091788, 0.5]
    assert temperature_schedule("onex:0.5:0.5", 5.0, counts) == pytest.approx(onex)
    linear = [5.0, 4.82142857, 4.28571429, 3.46938776, 2.5, 1.53061224, 0.71428571, 0.17857143]
    assert temperature_schedule("linear", 5.0, counts) == pytest.approx(linear)
    assert temperature_schedule("constant", 5.0, counts) == [5.0] * 8


def test_unknown_schedules_and_impossible_ones_name_the_choices() -> None:
    with pytest.raises(ValueError, match="cosine, linear"):
        token_schedule("square", 2, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 steps for 4"):
        token_schedule("linear", 0, 4)
    with pytest.raises(ValueError, match="constant, linear, onex"):
        temperature_schedule("onex:a", 1.0, [1])
    with pytest.raises(ValueError, match="maskgit, roar, halton, autoregressive"):
        Decoding(order="diffusion")  # type: ignore[arg-type]


def test_noise_belongs_to_its_seed_and_stream() -> None:
    both = uniform([3, 7], 2, 5)
    assert torch.equal(both[1], uniform([7], 2, 5)[0])
    assert not torch.equal(uniform([7], 2, 5), uniform([7], 3, 5))
    many = uniform(range(100), 0, 1000)
    assert float(many.min()) > 0
    assert float(many.max()) < 1
    assert abs(float(many.mean()) - 0.5) < 0.005


def test_filters_keep_the_likely_tokens_of_untempered_logits() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert torch.isfinite(filtered(logits, top_k=2)).tolist() == [[True, True, False, False]]
    for one in (1, 0.25):  # a count, a share
        assert torch.isfinite(filtered(logits, top_k=one)).tolist() == [[True, False, False, False]]
    assert torch.isfinite(filtered(logits, top_p=0.7)).tolist() == [[True, True, False, False]]
    even = torch.zeros(1, 4)
    assert torch.isfinite(filtered(even, top_p=0.3)).all()  # none is likelier than the others


def test_tokens_are_drawn_again_in_proportion_to_what_the_model_doubted() -> None:
    rows = 20_000
    confidence = torch.tensor([0.9, 0.5, 0.6, 0.0]).expand(rows, -1)
    free = torch.tensor([True, True, True, False]).expand(rows, -1)
    share = torch.bincount(to_redraw(range(rows), 3, confidence, free, 1)[:, 0], minlength=4) / rows
    assert share.tolist() == pytest.approx([0.1, 0.5, 0.4, 0.0], abs=0.02)
    assert (to_redraw(range(9), 3, confidence[:9], free[:9], 3).sort(1).values
            == torch.arange(3)).all()


@pytest.mark.parametrize("settings", [
    {"top_k": 7}, {"top_p": 0.6}, {"top_p": 1 - 1e-9}, {"top_k": 20, "top_p": 0.3},
])
def test_filters_keep_likely_logits_as_they_are_and_forbidden_ones_forbidden(settings) -> None:
    logits = 5 * torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0))
    logits[..., ::4] = -torch.inf
    found = filtered(logits, **settings)
    kept = torch.isfinite(found)
    assert torch.equal(found, torch.where(kept, logits, -torch.inf))
    least = torch.where(kept, logits, torch.inf).amin(-1)
    assert torch.isfinite(least).all()
    assert (torch.where(kept, -torch.inf, logits).amax(-1) < least).all()
    alone = torch.stack([filtered(row, **settings) for row in logits.flatten(0, 1)])
    assert torch.equal(found.flatten(0, 1), alone)


def test_samples_follow_their_probabilities_and_greedy_takes_the_best() -> None:
    logits = torch.tensor([0.6, 0.3, 0.1]).log().expand(4000, 3)
    tokens, sure = sample(logits, uniform([0], 0, 4000)[0], 1.0)
    shares = torch.bincount(tokens, minlength=3) / 4000
    assert torch.allclose(shares, torch.tensor([0.6, 0.3, 0.1]), atol=0.03)
    assert torch.allclose(sure, torch.tensor([0.6, 0.3, 0.1])[tokens])
    best, sure = sample(logits.reshape(40, 100, 3), torch.full((40, 100), 0.99), 0.0)
    assert best.unique().tolist() == [0]
    assert torch.allclose(sure, torch.full((40, 100), 0.6))


CAPTION = words(3, 210, 230, 3)
GUIDANCE: dict[str, dict[str, Any]] = {
    "none": {},
    "scale": {"guidance": 2.0},
    "weights": {"guidance": {"tok_rgb@64": 2.0, "caption": -0.5}},
    "branches": {"branches": ({"caption": CAPTION}, {"caption": words(3, 240, 3)})},
}


@pytest.mark.parametrize("order", ["maskgit", "roar", "halton", "autoregressive", "remask"])
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_a_row_comes_out_the_same_whatever_it_is_batched_with(
    model: FourM, order: str, guidance: str
) -> None:
    options = dict(GUIDANCE[guidance])
    branches = [Branch(part, weight) for part, weight in
                zip(options.pop("branches", ()), (1.5, -0.5), strict=False)]  # fmt: skip
    if order == "remask":
        order, options = "maskgit", {**options, "remask": 0.4}
    decoding = Decoding(order=order, steps=3, **options)  # type: ignore[arg-type]
    target = "det" if order == "autoregressive" else "tok_depth@64"
    shown = {"tok_rgb@64": grid(3), "caption": CAPTION}
    together = draw(model, shown, target, decoding, [5, 6, 7], branches=branches)
    row = torch.tensor([2])
    last = {name: part.rows(row) for name, part in shown.items()}
    alone = draw(model, last, target, decoding, [7], branches=[b.rows(row) for b in branches])
    assert torch.equal(together.ids[2:], alone.ids)
    assert bool((together.confidence[0, :1] > 0).all())


def test_cached_decoding_equals_one_pass_over_the_whole_sequence(model: FourM) -> None:
    steps: list[Step] = []
    shown = {"tok_rgb@64": grid(1)}
    decoding = Decoding(order="autoregressive", temperature=0.0, show_opening=True)
    drawn = draw(model, shown, "caption", decoding, [0], observe=steps.append)
    fed = torch.cat([torch.tensor([[LAST - 1]]), drawn.ids], 1)[:, : len(steps)]
    index = model.config.index("caption")
    opened = Shown(fed[:, :1], torch.ones(1, 1, dtype=torch.bool))
    with torch.inference_mode():
        encoded = model.encode(gather_inputs(model.config, shown | {"caption": opened}))
        place = torch.arange(fed.shape[1])[None]
        y = model.decode(encoded, fed, torch.full_like(fed, index), place, place + 1)
        whole = model.logits(y, model.config.by_name["caption"])
    cached = torch.cat([step.logits for step in steps], 1)
    assert torch.allclose(whole, cached, atol=1e-4)


def test_rows_of_a_sequence_end_on_their_own(model: FourM) -> None:
    decoding = Decoding(order="autoregressive", temperature=1.0, guidance=1.5)
    shown = grid(24)
    drawn = draw(model, {"tok_rgb@64": shown}, "caption", decoding, list(range(24)))
    for row in (0, 11, 23):
        one = {"tok_rgb@64": shown.rows(torch.tensor([row]))}
        alone = draw(model, one, "caption", decoding, [row])
        assert torch.equal(drawn.ids[row], alone.ids[0])
        assert drawn.lengths[row] == alone.lengths[0]
    assert not bool((drawn.ids == LAST).any())


def test_copies_differ_and_the_first_is_the_single_sample(model: FourM) -> None:
    for target, order in (("tok_depth@64", "maskgit"), ("caption", "autoregressive")):
        decoding = Decoding(order=order, steps=2, temperature=4.0)  # type: ignore[arg-type]
        shown = {"tok_rgb@64": grid(2)}
        many = draw(model, shown, target, decoding, [1, 2], copies=3)
        one = draw(model, shown, target, decoding, [1, 2])
        assert torch.equal(many.ids[0], one.ids[0])
        assert torch.equal(many.ids[3], one.ids[1])
        assert not torch.equal(many.ids[0], many.ids[1])


def test_guidance_is_the_formula_over_branches(model: FourM) -> None:
    steps: list[Step] = []
    caption = Shown(torch.full((1, 3), 210), torch.ones(1, 3, dtype=torch.bool))
    shown = {"tok_rgb@64": grid(1), "caption": caption}
    scale = Decoding(order="maskgit", guidance=3.0)
    draw(model, shown, "tok_depth@64", scale, [0], observe=steps.append)
    base, conditional = steps[0].branches
    assert torch.allclose(steps[0].logits, base + 3.0 * (conditional - base), atol=1e-4)
    weights = Decoding(order="maskgit", guidance={"tok_rgb@64": 1.5, "caption": -0.5})
    draw(model, shown, "tok_depth@64", weights, [0], observe=steps.append)
    base, first, second = steps[1].branches
    expected = base + 1.5 * (first - base) - 0.5 * (second - base)
    assert torch.allclose(steps[1].logits, expected, atol=1e-4)


def test_a_finished_text_is_a_condition_through_its_end(model: FourM) -> None:
    drawn = Drawn(torch.tensor([[9, 8, 3, 7, 0]]), torch.ones(1, 5), torch.tensor([4]))
    part = as_condition(model.config, "caption", drawn)
    assert part.visible.tolist() == [[True, True, True, False, False]]


def test_orders_that_do_not_fit_and_inputs_as_targets_are_refused(model: FourM) -> None:
    with pytest.raises(ValueError, match="its order is autoregressive"):
        draw(model, {}, "caption", Decoding(order="roar"), [0])
    with pytest.raises(ValueError, match="cannot be generated"):
        draw(model, {}, "rgb@64", Decoding(order="roar"), [0])


@pytest.fixture(scope="module")
def generator(model: FourM, text: TextTokenizer) -> Generator:
    coarse = {"rgb": Grey(colours=True), "depth": Grey()}
    return Generator(model, coarse, text, bf16=False)  # type: ignore


def test_values_in_values_out_over_a_chain(generator: Generator) -> None:
    images = [np.full((64, 64, 3), level, np.uint8) for level in (10, 200, 90)]
    found = generator.generate(
        {"rgb": images}, ["depth", "caption", "det"], num_samples=2, batch_size=4
    )
    assert [len(group) for group in found["depth"].samples] == [2, 2, 2]
    assert found["depth"].values[0].shape == (64, 64)
    assert isinstance(found["caption"].values[0], str)
    assert "instances" in found["det"].values[0]
    again = generator.generate({"rgb": images[1:2]}, ["depth", "caption"], num_samples=2, seeds=[1])
    assert np.array_equal(again["depth"].tokens, found["depth"].tokens[2:4])
    assert again["caption"].values[0] == found["caption"].values[1]


def test_absent_conditions_of_single_rows_stay_unseen(generator: Generator) -> None:
    shown = generator.show({"caption": ["a red cube", None], "det": [None, None]})
    assert list(shown) == ["caption"]
    assert shown["caption"].visible.any(1).tolist() == [True, False]


@pytest.mark.parametrize("batch_size", [64, 2])
def test_rows_that_lack_a_condition_come_out_as_alone(
    generator: Generator, batch_size: int
) -> None:
    image = np.full((64, 64, 3), 90, np.uint8)
    given: dict[str, list[Any]] = {
        "rgb": [None, image, None, Tokens(np.arange(GRID) % 11)],
        "caption": ["a red cube", None, "a small sphere", None],
    }
    asked: dict[str, Any] = {"targets": ["depth", "det"], "num_samples": 2}
    whole = generator.generate(given, **asked, batch_size=batch_size)
    for row in range(4):
        alone = {name: values[row] for name, values in given.items() if values[row] is not None}
        own = generator.generate(alone, **asked, seeds=[row])
        for name, found in own.items():
            assert np.array_equal(found.tokens, whole[name].tokens[2 * row : 2 * row + 2])


def test_seeds_may_be_numbers_of_numpy(generator: Generator) -> None:
    image = np.full((64, 64, 3), 90, np.uint8)
    found = [generator.generate({"rgb": image}, ["depth", "caption"], seeds=seeds)
             for seeds in ([7], np.array([7], np.int32), np.array([7]))]  # fmt: skip
    for name in ("depth", "caption"):
        assert all(np.array_equal(one[name].tokens, found[0][name].tokens) for one in found)
    assert torch.equal(uniform([7], 0, 3), uniform(np.array([7]), 0, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize(("asked", "sentence"), [
    ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
    ({"batch_size": -2}, "batch_size must be at least 1, got -2"),
    ({"conditions": {"rgb": []}}, "at least one condition or seed"),
    ({"conditions": {"rgb": np.zeros((64, 64), np.uint8)}}, r"\[H, W, 3\] .* not uint8 \[64, 64\]"),
    ({"conditions": {"rgb": np.zeros((64, 64, 3), np.float32)}}, "0..255, not float32"),
    ({"conditions": {"rgb": np.zeros((64, 48, 3), np.uint8)}}, "64 x 64 pixels, not 48 x 64"),
])
def test_what_cannot_be_generated_from_is_said_in_words(
    generator: Generator, asked: dict[str, Any], sentence: str
) -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match=sentence):
        generator.generate(**{"conditions": {"rgb": image}, "targets": ["depth"], **asked})


@pytest.mark.parametrize(("field", "value"), [
    ("steps", 0), ("top_p", -0.1), ("top_p", 1.5), ("top_k", -1), ("temperature", -0.5),
    ("temperature", float("nan")),
])
def test_settings_that_cannot_decode_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}.* {value}|at least 1 step, got 0"):
        Decoding(order="roar", **{field: value})  # type: ignore[arg-type]


def test_unknown_names_list_the_choices(generator: Generator) -> None:
    image = [np.zeros((64, 64, 3), np.uint8)]
    with pytest.raises(ValueError, match="'edges' cannot be generated; choose from caption"):
        generator.generate({"rgb": image}, ["edges"])
    with pytest.raises(ValueError, match="'clip' cannot be an input; choose from caption"):
        generator.generate({"clip": image}, ["depth"])
    with pytest.raises(ValueError, match="of one length"):
        generator.generate({"rgb": image, "caption": ["a", "b"]}, ["depth"])
    with pytest.raises(ValueError, match="resize the input"):
        generator.generate({"rgb": [np.zeros((32, 32, 3), np.uint8)]}, ["depth"])


def test_boxes_are_read_with_their_confidence(text: TextTokenizer) -> None:
    good = text.encode("v0=0 v1=1 v2=6 v3=7 cube")
    broken = text.encode("v0=6 v1=1 v2=2 v3=7 sphere v0=1 v1=1 cube")
    confidence = np.full(len(good + broken), 0.25)
    boxes = read_boxes(good + broken, confidence, text)
    assert [box["class_name"] for box in boxes] == ["cube"]
    assert boxes[0]["box"] == pytest.approx([0, 1 / 7, 6 / 7, 1])
    assert boxes[0]["score"] == pytest.approx(0.25)


def test_samples_combine_as_their_modality_asks() -> None:
    assert combine("depth", [np.zeros((1, 1)), np.ones((1, 1))])[0, 0] == pytest.approx(0.5)
    normals = [np.array([[[1.0, 0, 0]]]), np.array([[[0, 0, 1.0]]])]
    assert combine("normal", normals)[0, 0] == pytest.approx([2**-0.5, 0, 2**-0.5])
    classes = [np.full((1, 1), c, np.uint8) for c in (5, 2, 5)]
    assert combine("semseg", classes).tolist() == [[5]]
    assert combine("caption", ["a b", "a b c", "x"]) in ("a b", "a b c")
    two, other = [[0, 0, 0], [10, 20, 30]], [[4, 0, 0], [20, 20, 30]]
    palettes = [{"2": two}, {"1": [[9, 9, 9]]}, {"2": other}]
    assert combine("color_palette", palettes) == {"2": [[2, 0, 0], [15, 20, 30]]}
    assert combine("color_palette", [{}, {}]) == {}
    fields = [{"n_humans": 1}, {"n_humans": 4, "contrast": 2.0}, {"n_humans": 2}, {"n_humans": 9}]
    assert combine("metadata", fields) == {"n_humans": 2, "contrast": 2.0}
    assert combine("human_poses", [{"humans": []}, {"humans": [1]}]) == {"humans": []}


def test_boxes_are_voted_for() -> None:
    def seen(*boxes: tuple[float, ...]) -> dict:
        return {"instances": [{"box": list(b), "class_name": "cube", "score": 0.9} for b in boxes]}

    near, off = (0.1, 0.1, 0.5, 0.5), (0.6, 0.6, 0.9, 0.9)
    voted = vote_boxes([seen(near), seen((0.12, 0.1, 0.5, 0.52), off), seen(near)])["instances"]
    assert len(voted) == 2
    assert voted[0]["score"] > 0.9 > 0.4 > voted[1]["score"]
    assert voted[0]["box"] == pytest.approx([0.1067, 0.1, 0.5, 0.5067], abs=1e-3)
    assert vote_boxes([seen(), seen()]) == {"instances": []}


@pytest.mark.parametrize(("seen", "sizes"), [
    ([[0, 0], [GRID, GRID]], (0, GRID)),
    ([[3, 3], [GRID, GRID]], (3, GRID)),
    ([[0, 5], [2, 0]], (5, 2)),
    ([[0, 0], [0, 0]], (1, 0)),
    ([[4, 4], [4, 4]], (4, 4)),
])
def test_branches_share_a_row_and_are_decoded_as_if_alone(
    model: FourM, seen: list[list[int]], sizes: tuple[int, int]
) -> None:
    count = torch.tensor(seen).flatten()
    pixels = torch.randint(0, 256, (4, GRID, 768), dtype=torch.uint8)
    few = torch.where(count > 3, 1, 0)
    shown = {"rgb@64": Shown(pixels, torch.arange(GRID) < (count - few)[:, None]),
             "tok_depth@64": Shown(grid(4).values, torch.arange(GRID) < few[:, None])}
    assert side_by_side(gather_inputs(model.config, shown), 2).enc_sizes == sizes
    spec = model.config.by_name["tok_depth@64"]

    def decoded(context: Context, rows: int) -> torch.Tensor:
        place = torch.arange(GRID).expand(rows, GRID)
        modality = torch.full_like(place, model.config.index(spec.name))
        return model.decode(context.encoded, torch.zeros_like(place), modality, place, None,
                            context.caches)

    with torch.inference_mode():
        both = Context.read(model, shown, 2)
        kept = torch.tensor([1, 0, 1])
        found = decoded(both, 2)
        both.caches = Context.read(model, shown, 2).caches
        both.pick(kept)
        picked = decoded(both, 3)
        for row in range(4):
            one = {name: part.rows(torch.tensor([row])) for name, part in shown.items()}
            alone = decoded(Context.read(model, one), 1)[0]
            assert torch.allclose(found[row], alone, atol=1e-4)
        assert torch.allclose(picked, found[torch.cat([kept, kept + 2])], atol=1e-4)

