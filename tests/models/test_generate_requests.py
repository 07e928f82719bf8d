"""What is asked of a generator: odd values and settings are refused by name, before any work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from models.fourm.conditions import FIRST, Shown
from models.fourm.decoding import Decoding, draw
from models.fourm.generate import Generator, Guide, Part, Tokens
from models.fourm.model import FourM
from models.fourm.spec import EOS_ID, UNKNOWN_ID, FourMConfig
from models.fourm.vectors import valid_vectors
from tests.models.tiny_fourm import GRID, network, picture
from tokenizers_vq.text import TextTokenizer


@pytest.mark.parametrize(("conditions", "sentence"), [
    ({"caption": 5}, "caption takes one sentence; 5 is none of them"),
    ({"det": {"boxes": []}}, "det takes .*; {'boxes': .*} is none of them"),
    ({"det": Tokens(np.arange(3))}, "det takes .*Tokens.* is none of them"),
    ({"depth": Tokens(np.zeros((4, 4), int))}, r"16 whole numbers, not int64 \[4, 4\]"),
    ({"depth": [Tokens(np.zeros(5, int))]}, r"16 whole numbers, not int64 \[5\]"),
    ({"depth": Tokens(np.full(GRID, 0.7))}, r"16 whole numbers, not float64 \[16\]"),
    ({"depth": Part(np.zeros((64, 64)), [[True] * 5] * 4)}, r"not a mask of shape \(4, 5\)"),
    ({"depth": np.zeros((32, 128))}, "depth is square to the model, not 128 x 32: crop it"),
    ({"caption": Part("a red cube left of a large red cube and a small metal ___")},
     "must not be cut: it has .* tokens, caption takes 12: 'a red cube"),
    ({"caption": Part("___ a " * 199)}, "at most 198 holes, not 199"),
])
def test_values_that_a_modality_does_not_take_are_named(
    generator: Generator, conditions: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        generator.generate(conditions, ["rgb"])


def test_what_looks_like_a_special_token_is_words(generator: Generator) -> None:
    shown = generator.show({"caption": ["a [S_1] cube [EOS]", Part("a ___")]})["caption"]
    said = shown.values[0][shown.visible[0]].tolist()
    assert said[-1] == EOS_ID
    assert FIRST not in said
    assert said.count(EOS_ID) == 1
    assert UNKNOWN_ID in said  # brackets are no words of this small tokenizer
    assert FIRST in shown.values[1].tolist()


def test_a_text_tokenizer_of_another_model_is_refused(model: FourM, text: TextTokenizer) -> None:
    word = text.encode("sphere")[0]
    specs = [replace(spec, vocab_size=word) if spec.kind == "seq" else spec
             for spec in model.config.modalities]  # fmt: skip
    small = FourM(FourMConfig(modalities=tuple(specs), dim=32, num_heads=2, encoder_depth=1,
                              decoder_depth=1))  # fmt: skip
    generator = Generator(small, {}, text)
    with pytest.raises(ValueError, match=f"the model knows {word}: the text"):
        generator.show({"caption": ["a sphere"]})


def test_a_mask_of_vectors_must_be_as_long_as_they_are() -> None:
    with pytest.raises(ValueError, match=r"mask_valid \(2,\) does not go with emb \(3, 4\)"):
        valid_vectors({"emb": np.zeros((3, 4), np.float32), "mask_valid": [True, False]})


def test_a_target_that_is_no_input_is_never_read(text: TextTokenizer) -> None:
    config = network(text).config
    specs = [replace(spec, is_input=spec.kind == "pixels") for spec in config.modalities]
    torch.manual_seed(0)
    model = FourM(replace(config, modalities=tuple(specs))).eval()
    depth, half = Decoding(order="maskgit", temperature=0.0), torch.arange(GRID) < GRID // 2
    logits: list[torch.Tensor] = []
    for level in (1, 2):
        part = Shown(torch.full((1, GRID), level), half.unsqueeze(0))
        draw(model, {"tok_depth@64": part}, "tok_depth@64", depth, [0],
             observe=lambda step: logits.append(step.logits))  # fmt: skip
    for opening in (False, True):
        det = Decoding(order="autoregressive", temperature=0.0, show_opening=opening)
        draw(model, {}, "det", det, [0], observe=lambda step: logits.append(step.logits))
    words = logits[2:]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(torch.cat(words[: len(words) // 2]), torch.cat(words[len(words) // 2 :]))


ROAR = Decoding(order="roar")


@pytest.mark.parametrize(("targets", "asked", "sentence"), [
    (["depth"], {"settings": {"depht": ROAR}}, "'depht' cannot be generated; choose from caption"),
    (["depth"], {"settings": {"depth": Decoding(order="roar", guidance={"det": 2.0})}},
     "tok_depth@64 is guided by 'det', but the conditions are rgb"),
    (["depth"], {"settings": {"depth": Decoding(order="roar", guided=frozenset({"rbg"}))}},
     "tok_depth@64 is guided by 'rbg', but the conditions are rgb"),
    (["depth", "caption"], {"settings": {"caption": ROAR}}, "caption cannot be decoded by roar"),
    (["depth", "caption"],
     {"settings": {"caption": Decoding(order="autoregressive", well_formed=True)}},
     "'caption' has no grammar"),
])
def test_requests_that_do_not_fit_are_refused_before_anything_is_drawn(
    generator: Generator, targets: list[str], asked: dict[str, Any], sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("models.fourm.sampler.draw", None)
    with pytest.raises(ValueError, match=sentence):
        generator.generate(**{"conditions": {"rgb": picture()}, "targets": targets, **asked})


def test_targets_without_a_tokenizer_are_refused_before_anything_is_drawn(
    model: FourM, text: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.fourm.sampler.draw", None)
    with pytest.raises(ValueError, match="no tokenizer for 'depth'; there are none"):
        Generator(model, {}, text).generate({"rgb": picture()}, ["caption", "depth"])


@pytest.mark.parametrize(("field", "value", "sentence"), [
    ("schedule", "cos", "unknown token schedule 'cos'; choose from cosine, linear"),
    ("temperature_schedule", "cool", "unknown temperature schedule 'cool'"),
    ("steps", 2.5, "at least 1 step, got 2.5"),
    ("guidance", float("nan"), "guidance must be finite, not nan"),
    ("guidance", {"rgb": float("inf")}, "guidance must be finite"),
])
def test_settings_that_would_fail_while_decoding_are_refused(
    field: str, value: Any, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        Decoding(order="roar", **{field: value})


def test_guides_need_conditions_and_a_finite_weight() -> None:
    for conditions, weight in (({}, 1.0), ({"caption": "a"}, float("nan"))):
        with pytest.raises(ValueError, match="conditions and a finite weight, not"):
            Guide(conditions, weight)


def test_guidance_goes_by_any_name_of_a_condition_and_leaves_rows_that_lack_it(
    generator: Generator,
) -> None:
    def tokens(rows: list[int], **changes: Any) -> np.ndarray:
        given = {"rgb": [picture(row) for row in rows],
                 "caption": [["a red cube", None, "a sphere"][row] for row in rows]}
        settings = {"tok_depth@64": Decoding(order="roar", steps=3, **changes)}
        return generator.generate(given, ["depth"], settings=settings, seeds=rows)["depth"].tokens

    for first, second in (
        ({"guidance": {"rgb": 3.0, "caption": -1.5}},
         {"guidance": {"rgb@64": 3.0, "caption": -1.5}}),
        ({"guidance": 3.0, "guided": frozenset({"rgb"})},
         {"guidance": 3.0, "guided": frozenset({"rgb@64"})}),
    ):  # fmt: skip
        every = tokens([0, 1, 2], **first)
        assert np.array_equal(every, tokens([0, 1, 2], **second))
        assert not np.array_equal(every, tokens([0, 1, 2]))
        assert np.array_equal(every[[2, 0]], tokens([2, 0], **first))
    alone = generator.generate({"rgb": picture(1)}, ["depth"], seeds=[1], settings={
        "depth": Decoding(order="roar", steps=3, guidance={"rgb": 3.0})})["depth"].tokens
    assert np.array_equal(alone[0], tokens([0, 1, 2], guidance={"rgb": 3.0, "caption": -1.5})[1])


def test_targets_that_are_given_whole_stay_as_they_are(generator: Generator) -> None:
    depth = np.arange(GRID) % 11
    given: dict[str, Any] = {"caption": ["a red cube", None], "depth": [None, Tokens(depth)]}
    found = generator.generate(given, ["caption", "depth"], num_samples=2)
    assert found["caption"].samples[0] == ["a red cube"] * 2
    assert (found["depth"].tokens[2:] == depth).all()
    free = generator.generate({"depth": Tokens(depth)}, ["caption"], seeds=[1], num_samples=2)
    assert found["caption"].samples[1] == free["caption"].samples[0]


def test_edits_of_what_is_no_picture_or_box_are_refused(generator: Generator) -> None:
    area, none = np.ones((4, 4), bool), {"instances": []}
    with pytest.raises(ValueError, match=r"depth is given as tokens, .* set paste=False"):
        generator.inpaint("depth", Tokens(np.zeros(GRID, int)), area)
    kept = generator.inpaint("depth", Tokens(np.zeros(GRID, int)), ~area, paste=False)
    assert not kept.tokens.any()
    with pytest.raises(ValueError, match=r"boxes are a value of det, .* not \{'boxes': 1\}"):
        generator.edit_boxes(picture(), none, {"boxes": 1})
    with pytest.raises(ValueError, match="nothing to refine; choose from nothing"):
        generator.upscale({})
