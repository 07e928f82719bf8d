"""Trainings, tokenizers and labelers on a GPU leave nothing on the CPU; see `tests.pretend_gpu`."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from infra.store import Store
from tasks.evaluation.matrix import loss_matrix
from tasks.generate import load_generator
from tasks.run_store import Checkpoints
from tasks.tokenizer_config import TokenizerRecipe
from tasks.tokenizer_task import ReconstructionTask
from tasks.train import FourMTask
from tasks.trainer import TrainConfig, Trainer
from tests.models.tiny_fourm import CODES, network, picture, small_text
from tests.models.token_set import make_set
from tests.pretend_gpu import GPU, READS, OnGPU, gpu, on_cpu
from tests.tasks.test_train import TINY
from tests.tasks.test_trainer import CONFIG, Regression
from tokenizers_vq.codec import ValueCodec
from tokenizers_vq.text import FILE
from tokenizers_vq.tokenizer import Tokenizer, from_files
from tokenizers_vq.vqvae import VQVAE, VQConfig


class Codes(Regression):
    """With a buffer that forward passes move, and without dropout."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 4))


class Plain(Codes):
    """All of it for AdamW."""

    def is_hidden(self, name: str) -> bool:
        return False


MEAN = dataclasses.replace(CONFIG, ema_decay=0.9, finish_with_ema=True, accumulate=2)


@pytest.mark.parametrize(("task", "config"), [(Codes, MEAN), (Plain, CONFIG)])
def test_a_run_on_a_gpu_is_that_of_the_cpu_skipped_steps_and_resume_included(
    tmp_path, task, config
):
    store = Store(str(tmp_path))
    whole = Trainer(store, "cpu", task(broken_at=3), config).fit()
    with gpu():
        with pytest.raises(KeyError, match="killed"):
            Trainer(store, "gpu", task(broken_at=3, die_at=7), config).fit()
        assert Checkpoints(store, "gpu").steps()[-1] == 7
        found = Trainer(store, "gpu", task(broken_at=3), config).fit()
        assert all(isinstance(value, OnGPU) for value in found.model.state_dict().values())
    assert found.skipped == whole.skipped == 1
    torch.testing.assert_close(
        on_cpu(dict(found.model.state_dict())), dict(whole.model.state_dict())
    )


@pytest.mark.parametrize("kind", ["4m", pytest.param("tokenizer", marks=pytest.mark.slow)])
def test_the_host_reads_nothing_of_the_gpu_between_two_points_of_the_curve(tmp_path, kind):
    if kind == "4m":
        task: Any = FourMTask(*make_set(str(tmp_path)), dataclasses.replace(TINY, muon=False))
    else:
        task, _ = _tokenizer("fsq", muon=False)
    counts = []
    for steps in (2, 4):
        config = dataclasses.replace(
            TINY.training, steps=steps, batch_size=4, log_every=8, checkpoint_seconds=1e9,
            precision="bf16", ema_decay=0.9,
        )  # fmt: skip
        with gpu():
            Trainer(Store(str(tmp_path)), f"{steps}", task, config).fit()
        counts.append(READS.copy())
    assert counts[0] == counts[1]


@pytest.mark.parametrize("changes", [
    {}, pytest.param({"precision": "bf16", "ema_decay": 0.5}, marks=pytest.mark.slow)
])  # fmt: skip
def test_4m_trains_and_is_evaluated_on_a_gpu_as_on_the_cpu(tmp_path, changes):
    store, manifest = make_set(str(tmp_path))
    recipe = dataclasses.replace(
        TINY, training=dataclasses.replace(TINY.training, **changes), freeze=("encoder.0.*",),
        start="none",
    )  # fmt: skip
    found = []
    for device in ("cpu", "gpu"):
        task = FourMTask(store, manifest, recipe)
        if device == "gpu":
            with gpu():
                found.append(Trainer(store, device, task, recipe.training).fit())
        else:
            found.append(Trainer(store, device, task, recipe.training).fit())
    close = {"rel": 0.02} if changes.get("precision") else {"rel": 1e-4}
    for name, value in found[0].metrics.items():
        if "loss" in name or name.startswith("val/"):
            assert found[1].metrics[name] == pytest.approx(value, **close), name


RECIPE = TokenizerRecipe(kind="depth", size=32, patch=8, width=32, steps=3, batch_size=4)
NETWORK = VQConfig(channels=1, image_size=32, patch=8, width=32, heads=2, levels=(4, 4, 3))
QUANTIZERS: dict[str, dict[str, Any]] = {
    "fsq": {"spread": 0.1, "jitter": 0.1}, "vq": {"codebook_size": 16},
    "lfq": {"codebook_size": 16}, "ordered": {"registers": 4},
}  # fmt: skip


def _tokenizer(kind: str, **changes: Any) -> tuple[ReconstructionTask, list[np.ndarray]]:
    """Of depth maps, and some of these."""
    recipe, rng = dataclasses.replace(RECIPE, **changes), np.random.default_rng(0)
    depths = list(rng.uniform(0.1, 1, (8, 32, 32)).astype(np.float32))
    codec = recipe.codec(np.stack(depths))
    config = {"quantizer": kind} if kind in ("vq", "lfq") else {}
    network = dataclasses.replace(NETWORK, **config, **QUANTIZERS[kind])
    packed = np.stack([codec.pack(depth) for depth in depths])
    return ReconstructionTask(recipe, network, codec, packed), depths


@pytest.mark.parametrize("kind", [
    "fsq", *(pytest.param(kind, marks=pytest.mark.slow) for kind in QUANTIZERS if kind != "fsq")
])  # fmt: skip
def test_a_tokenizer_is_trained_and_used_on_a_gpu(tmp_path, kind):
    task, depths = _tokenizer(kind)
    codec = task.codec
    training = TrainConfig(steps=3, batch_size=4, lr=1e-3, warmup_steps=0, precision="fp32")
    with gpu():
        net = Trainer(Store(str(tmp_path)), "run", task, training).fit().model
        tokenizer = Tokenizer("depth", net, codec, "fp32")
        assert tokenizer.device == GPU
        tokens = tokenizer.encode_values(depths)
        values = tokenizer.decode_tokens(tokens)
        assert len(tokenizer.decode_tokens(OnGPU(torch.from_numpy(tokens.astype(np.int64))))) == 8
        again = tokenizer.files()
    plain = from_files(again, "fp32")
    np.testing.assert_array_equal(plain.encode_values(depths), tokens)
    np.testing.assert_allclose(plain.decode_tokens(tokens), values, atol=1e-4)


def test_a_run_generates_and_is_evaluated_on_the_gpu_as_on_the_cpu(tmp_path, monkeypatch):
    store, text = Store(str(tmp_path)), small_text()
    store.write("runs/main/model/config.json", b"{}")
    store.write_json("runs/main/run.json", {"manifest": ["main", 1]})
    store.write(f"text/{FILE}", text.to_bytes())
    for name, channels in (("rgb", 3), ("depth", 1)):
        shape = dataclasses.replace(NETWORK, channels=channels, image_size=64, patch=16,
                                    levels=(CODES,))  # fmt: skip
        Tokenizer(name, VQVAE(shape), ValueCodec(kind=name)).save(tmp_path / name)
    made = SimpleNamespace(tokenizers={name: {"path": name} for name in ("rgb", "depth", "text")})
    monkeypatch.setattr("tasks.generate.load_manifest", lambda *_: made)
    monkeypatch.setattr("models.fourm.checkpoint.load_stored", lambda *_: network(text))
    monkeypatch.setattr("tokenizers_vq.tokenizer.fast_bf16", lambda device: False)
    given = {"rgb": [picture(0), picture(1)], "caption": ["a red cube", "a small sphere"]}
    found = []
    for context in (nullcontext, gpu):
        with context():
            generator = load_generator(store, "main")
            drawn = generator.generate(given, ["depth"], num_samples=2)["depth"]
            matrix = loss_matrix(generator, {**given, "depth": drawn.values})
            found.append((drawn.tokens, np.stack(drawn.values), matrix))
            device = generator.model.mask_token.device
    assert device == generator.tokenizers["rgb"].device == GPU
    np.testing.assert_array_equal(found[1][0], found[0][0])
    np.testing.assert_allclose(found[1][1], found[0][1], atol=1e-4)
    for name, row in found[0][2].items():
        assert found[1][2][name] == pytest.approx(row, abs=2e-3)
