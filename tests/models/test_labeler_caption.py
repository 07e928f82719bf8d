"""The caption labeler runs real captioners, and the shipped one describes scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.scenes import EVAL_SEED, caption_score, render, sample_scene
from models.labelers.base import LabelerSpec
from models.labelers.caption import CaptionLabeler

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "cup")


def spec(source: object, **options: Any) -> LabelerSpec:
    return LabelerSpec(
        "caption", ("caption",), str(source), options=options, batch_size=4, device="cpu"
    )


def images(count: int) -> list[np.ndarray]:
    return [
        np.random.default_rng(k).integers(0, 256, (64, 80, 3), dtype=np.uint8)
        for k in range(count)
    ]


def tokenizer() -> Any:
    from transformers import BertTokenizerFast

    return BertTokenizerFast(vocab={word: number for number, word in enumerate(WORDS)})


def blip(folder: Path) -> None:
    from transformers import (
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    width = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "projection_dim": 16,
    }  # fmt: skip
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    config = BlipConfig(
        text_config=width | ids | {"vocab_size": len(WORDS), "max_position_embeddings": 32},
        vision_config=width | {"image_size": 32, "patch_size": 16},
    )
    BlipForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    BlipProcessor(BlipImageProcessor(size=size), tokenizer()).save_pretrained(folder)


def git(folder: Path) -> None:
    from transformers import CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor

    width = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    config = GitConfig(
        vision_config=width | {"image_size": 32, "patch_size": 16}, **width,
        vocab_size=len(WORDS), max_position_embeddings=32, num_image_with_embedding=None,
        pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    GitForCausalLM(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    GitProcessor(CLIPImageProcessor(size=size, do_center_crop=False), tokenizer()).save_pretrained(
        folder
    )


@pytest.mark.parametrize("checkpoint", [blip, git])
def test_any_captioner_gives_an_image_one_text_of_limited_length(checkpoint, tmp_path):
    checkpoint(tmp_path)
    texts = CaptionLabeler(spec(tmp_path, max_new_tokens=6)).label(images(5))["caption"]
    assert len(texts) == 5
    for text in texts:
        assert len(text.split()) <= 6
        assert "[" not in text


def test_a_prompt_begins_the_caption(tmp_path):
    blip(tmp_path)
    texts = CaptionLabeler(spec(tmp_path, prompt="a red", max_new_tokens=3)).label(images(2))
    assert all(text.startswith("a red") for text in texts["caption"])


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"num_beams": 0}, {"beams": 2}])
def test_options_outside_their_range_or_unknown_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        CaptionLabeler(spec("nowhere", **options))


def test_the_shipped_captioner_describes_scenes_it_never_saw():
    views = [render(sample_scene(EVAL_SEED + 1000 + k), 128) for k in range(8)]
    texts = CaptionLabeler(spec("shipped:caption")).label([view.rgb for view in views])["caption"]
    scores = [caption_score(text, v.caption) for text, v in zip(texts, views, strict=True)]
    assert np.mean(scores) > 0.6


@pytest.mark.parametrize("caption", ["a big x left of a y behind a z", "a x in front of a y"])
def test_mirroring_a_caption_twice_gives_it_back(caption):
    from tasks.teachers.caption import mirror

    assert mirror(caption) != caption
    assert mirror(mirror(caption)) == caption
