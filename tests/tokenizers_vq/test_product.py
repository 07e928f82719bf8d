"""Vectors as several tokens: shapes, round trips of files, and learning."""

import numpy as np
import pytest
import torch

from tasks.tokenizer_config import TokenizerRecipe
from tasks.tokenizer_recipes import tokenizer_recipe
from tokenizers_vq.codec import ValueCodec
from tokenizers_vq.ordered import build_network
from tokenizers_vq.tokenizer import Tokenizer, from_files
from tokenizers_vq.vqvae import VQConfig


def small() -> Tokenizer:
    torch.manual_seed(0)
    config = VQConfig(channels=6, image_size=1, patch=1, width=16, groups=4, levels=(4, 3))
    codec = ValueCodec(kind="vector", mean=(0.0,) * 6, std=(1.0,) * 6)
    return Tokenizer("dinov2_global", build_network(config), codec, "fp32")


def test_a_vector_becomes_its_groups_of_tokens_and_a_vector_again() -> None:
    tokenizer = small()
    values = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float16)
    tokens = tokenizer.encode_values(values)
    assert tokens.shape == (3, 4) == (3, tokenizer.num_tokens)
    assert tokens.max() < tokenizer.vocab_size == 12
    assert [value.shape for value in tokenizer.decode_tokens(tokens)] == [(6,)] * 3
    again = from_files(tokenizer.files(), "fp32")
    assert np.array_equal(again.encode_values(values), tokens)


def test_another_number_of_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="3 tokens instead of 4"):
        small().decode_tokens(np.zeros((1, 3), np.uint16))
    with pytest.raises(ValueError, match="groups=4 is for vectors"):
        VQConfig(channels=3, groups=4)
    with pytest.raises(ValueError, match="groups=2 is for vectors, not for rgb"):
        TokenizerRecipe(kind="rgb", groups=2)


def test_more_groups_tell_a_vector_better_at_equal_training() -> None:
    values = torch.randn(256, 12, 1, 1, generator=torch.Generator().manual_seed(0))

    def error(groups: int) -> float:
        torch.manual_seed(0)
        config = VQConfig(channels=12, image_size=1, patch=1, width=32, groups=groups,
                          levels=(4, 4), encoder_depth=1, decoder_depth=1)  # fmt: skip
        net = build_network(config).train()
        optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
        for _ in range(120):
            loss = (net(values)[0] - values).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    one, eight = error(1), error(8)
    assert eight < 0.6 * one


def test_recipes_of_global_vectors_make_sixteen_tokens() -> None:
    recipe = tokenizer_recipe("imagebind_global", width=32)
    packed = np.zeros((5, 7), np.float32)
    assert recipe.resolved(packed).num_tokens == 16
