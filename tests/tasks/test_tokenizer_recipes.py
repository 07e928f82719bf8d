"""Recipes of tokenizers: names stay, choices that cannot work are refused."""

import numpy as np
import pytest

from tasks.tokenizer_recipes import TextRecipe, TokenizerRecipe, identity, tokenizer_recipe


def test_recipes_that_use_nothing_new_keep_the_fields_their_stored_tokenizers_are_named_by():
    assert identity(tokenizer_recipe("depth")) == {
        "kind": "depth", "size": 128, "patch": 16, "levels": (8, 5, 5, 5), "quantizer": "fsq",
        "width": 256, "encoder_depth": 1, "decoder_depth": 2, "jitter": 0.0, "num_classes": 0,
        "depth_mode": "log", "steps": 500, "batch_size": 32, "lr": 1e-2, "min_scale": 0.8,
        "max_samples": 4000, "seed": 0,
    }
    assert identity(tokenizer_recipe("depth", registers=16))["registers"] == 16
    assert identity(TextRecipe()) == {"bins": 1000, "vocab_size": 30_000, "class_names": ()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "depth", "perceptual": 1.0}, "is for rgb, not for depth"),
        ({"kind": "feature", "sizes": (64,)}, "feature values have one size"),
        ({"kind": "rgb", "sizes": (64, 72)}, "72 is no multiple of patch=16"),
        ({"kind": "rgb", "sizes": (256,)}, "256 is no multiple of patch=16 up to size=128"),
    ],
)
def test_choices_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TokenizerRecipe(**changes)


def test_a_step_draws_one_size_for_all_workers():
    from tasks.tokenizer_task import ReconstructionTask

    recipe = TokenizerRecipe(kind="semseg", size=32, patch=8, sizes=(16, 32), batch_size=4)
    packed = np.random.default_rng(0).integers(0, 5, (6, 32, 32), dtype=np.uint8)
    task = ReconstructionTask(recipe, recipe.resolved(packed), recipe.codec(packed), packed)
    shapes = [[tuple(task.batch(step, rank, 2).shape) for rank in (0, 1)] for step in range(12)]
    assert all(ours == theirs for ours, theirs in shapes)
    assert {shape for pair in shapes for shape in pair} == {(2, 16, 16), (2, 32, 32)}
    assert set(np.unique(task.batch(0, 0, 2))) <= set(range(5))  # classes are not mixed


def test_a_new_decoder_is_trained_behind_the_codes_of_a_stored_tokenizer(tmp_path):
    import torch

    from infra.store import Store
    from tasks.tokenizer_task import reconstruction_task
    from tasks.trainer import Trainer
    from tokenizers_vq.ordered import build_network
    from tokenizers_vq.tokenizer import Tokenizer

    packed = np.random.default_rng(0).uniform(0.1, 1, (8, 32, 32)).astype(np.float16)
    first = TokenizerRecipe(kind="depth", size=32, patch=8, width=16, batch_size=4, steps=3)
    before = Tokenizer("depth", build_network(first.resolved(packed)), first.codec(packed), "fp32")
    before.save(tmp_path / "tokenizers" / "depth@0")
    store = Store(str(tmp_path))
    recipe = TokenizerRecipe(**{**identity(first), "encoder": "tokenizers/depth@0",
                                "decoder_depth": 3})
    task = reconstruction_task(store, "depth", recipe, packed)
    after = Trainer(store, "runs/decoder", task, recipe.training(1)).fit().model.eval()
    assert len(after.decoder) == 3
    x = task.codec.to_tensor(packed)
    with torch.no_grad():
        tokens = before.net.encode(x)
        assert torch.equal(after.encode(x), tokens)
        torch.manual_seed(recipe.seed)
        assert not torch.equal(after.decode(tokens), task.build_model().eval().decode(tokens))
    with pytest.raises(ValueError, match="is no rgb tokenizer trained here"):
        reconstruction_task(store, "rgb", recipe, packed)


def test_vectors_become_ordered_tokens_of_a_single_cell():
    from tokenizers_vq.ordered import OrderedVQ, build_network

    recipe = TokenizerRecipe(kind="vector", registers=4, width=16)
    packed = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)
    codec, network = recipe.codec(packed), recipe.resolved(packed)
    assert (network.channels, network.image_size, network.num_tokens) == (12, 1, 4)
    net = build_network(network).eval()
    assert isinstance(net, OrderedVQ)
    tokens = net.encode(codec.to_tensor(packed))
    assert tokens.shape == (5, 4)
    assert codec.from_tensor(net.decode(tokens[:, :2]))[0].shape == (12,)
