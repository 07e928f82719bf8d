"""Contracts of the 4M network: token-first computation, masks, losses, released checkpoints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models.fourm import checkpoint
from models.fourm.attention import additive, attention, key_mask, target_mask
from models.fourm.batch import from_released
from models.fourm.embeddings import sincos_1d, sincos_2d
from models.fourm.model import FourM, LayerCache
from models.fourm.spec import FourMConfig, ModalitySpec

SPECS = (
    ModalitySpec(name="rgb@32", kind="pixels", max_tokens=4, is_target=False),
    ModalitySpec(name="tok_depth@32", kind="img", max_tokens=4, vocab_size=11),
    ModalitySpec(name="tok_rgb@32", kind="img", max_tokens=4, vocab_size=13),
    ModalitySpec(name="caption", kind="seq", max_tokens=6, vocab_size=17),
    ModalitySpec(name="vector", kind="img", max_tokens=2, vocab_size=7, learned_positions=True),
)
CONFIG = FourMConfig(modalities=SPECS, dim=16, encoder_depth=1, decoder_depth=2, num_heads=2)
VECTORS = Path(__file__).parent / "vectors" / "fourm_tiny.safetensors"


def released(seed: int = 0) -> dict:
    """A batch of two in the released per-modality layout."""
    rng, out = np.random.default_rng(seed), {}
    for spec in SPECS:
        n = 2 * (spec.max_tokens + 1) if spec.kind == "seq" else spec.max_tokens
        hidden = np.ones((2, 2, n), bool)
        attend = np.zeros((2, n), np.int32)
        if spec.kind == "seq":
            hidden[0, :, :3], hidden[1, :, 6:10] = False, False
            attend[:, 6:10] = 1
        elif spec.is_target:
            hidden[0, :, :1], hidden[1, :, -1] = False, False
            attend[:, -1] = 1
        else:
            hidden[0] = False
        if spec.kind == "pixels":
            values = rng.standard_normal((2, 3, 32, 32)).astype(np.float32)
        else:
            values = rng.integers(0, spec.vocab_size, (2, n))
        out[spec.name] = {"tensor": values, "input_mask": hidden[0], "target_mask": hidden[1],
                          "decoder_attention_mask": attend}
    return out


def make(config: FourMConfig = CONFIG, seed: int = 0) -> FourM:
    torch.manual_seed(seed)
    return FourM(config).eval()


def test_stored_vectors_are_reproduced():
    tensors = load_file(VECTORS)
    model = make()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(tensors[f"weights.{name}"])
    losses = model(from_released(released(), CONFIG, 10, 8))
    assert torch.allclose(losses.total, tensors["loss"], atol=1e-5)
    losses.total.backward()
    gradient = model.encoder[0].attn.qkv.weight.grad
    assert torch.allclose(gradient, tensors["gradient"], atol=1e-5)


def test_padding_changes_nothing():
    model, data = make(), released()
    tight, loose = (model(from_released(data, CONFIG, n, m)) for n, m in ((10, 6), (25, 19)))
    assert torch.allclose(tight.total, loose.total, atol=1e-6)


def test_a_sample_without_inputs_is_finite():
    data = released()
    for entry in data.values():
        entry["input_mask"][0] = True
    assert torch.isfinite(make()(from_released(data, CONFIG, 10, 8)).total)


def test_the_mod_loss_averages_modalities_and_the_token_loss_tokens():
    model, batch = make(), from_released(released(), CONFIG, 10, 8)
    losses = model(batch)
    values = torch.stack(list(losses.per_modality.values()))
    counts = torch.tensor([c for c, s in zip(batch.counts, CONFIG.modalities, strict=True)
                           if s.is_target])
    assert torch.allclose(losses.total, values.mean())
    model.config = dataclasses.replace(CONFIG, loss="token")
    assert torch.allclose(model(batch).total, (values * counts).sum() / counts.sum())


def test_sequences_are_causal_and_modalities_do_not_see_each_other():
    modality = torch.tensor([[0, 0, 2, 2, 2, -1]])
    until = torch.tensor([[2, 2, 3, 4, 5, 0]])
    allowed = target_mask(modality, until)[0].int().tolist()
    assert allowed[0] == allowed[1] == [1, 1, 0, 0, 0, 0]
    assert [row[2:5] for row in allowed[2:5]] == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_attention_backends_agree():
    q, k, v = torch.randn(3, 2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = additive(key_mask(torch.tensor([[0, 1, 2, -1, -1], [0, 0, 0, 0, -1]])), q.dtype)
    full = attention(q, k, v, mask)
    half = attention(*(x.bfloat16() for x in (q, k, v, mask)))
    assert torch.allclose(full, half.float(), atol=0.03)


def test_cached_decoding_equals_decoding_at_once():
    model, spec = make(), CONFIG.by_name["caption"]
    encoded = model.encode(from_released(released(), CONFIG, 10, 8))
    ids = torch.tensor([[5, 7, 9], [5, 2, 4]])
    mod = torch.full_like(ids, CONFIG.index("caption"))
    pos = torch.arange(3).expand(2, 3)
    whole = model.logits(model.decode(encoded, ids, mod, pos, pos + 1), spec)
    caches = [LayerCache() for _ in model.decoder]
    parts = [model.decode(encoded, ids[:, i:i + 1], mod[:, i:i + 1], pos[:, i:i + 1], None, caches)
             for i in range(3)]
    assert torch.allclose(model.logits(torch.cat(parts, 1), spec), whole, atol=1e-5)


@pytest.mark.parametrize("change", [
    {}, {"tie_embeddings": False, "share_modality_embeddings": False},
    {"qk_norm": True, "num_register_tokens": 2}, {"bias": True, "gated_mlp": False},
])
def test_checkpoints_round_trip(tmp_path, change):
    config = dataclasses.replace(CONFIG, **change)
    model = make(config, seed=1)
    checkpoint.save_released(model, tmp_path)
    again = checkpoint.load(tmp_path)
    assert again.config == config
    batch = from_released(released(), config, 10, 8)
    assert torch.equal(model(batch).total, again(batch).total)


def test_a_released_folder_loads_without_our_file_and_with_shared_vectors_stored_once():
    contents = checkpoint.files(make())
    tensors = load_bytes(contents["model.safetensors"])
    assert tensors["encoder_embeddings.caption.pos_emb"].shape == (1, 512, 16)
    assert not tensors["encoder.0.norm1.bias"].any()
    del tensors["encoder_embeddings.caption.mod_emb"]
    files = {"config.json": contents["config.json"], "model.safetensors": save_bytes(tensors)}
    model = checkpoint.build(files, {"caption": (6, 6)})
    batch = from_released(released(), CONFIG, 10, 8)
    assert torch.equal(model(batch).total, make()(batch).total)
    assert model.config.by_name["vector"].learned_positions


def test_a_checkpoint_that_does_not_fit_names_the_tensor():
    contents = checkpoint.files(make())
    tensors = load_bytes(contents["model.safetensors"])
    del tensors["decoder.1.norm2.weight"]
    with pytest.raises(ValueError, match=r"lacks the tensor decoder\.1\.norm2\.weight"):
        checkpoint.build({**contents, "model.safetensors": save_bytes(tensors)})
    config = json.loads(contents["config.json"])
    config["num_heads"] = 3
    with pytest.raises(ValueError, match="num_heads"):
        checkpoint.build({**contents, "config.json": json.dumps(config).encode()})


def test_position_tables_concatenate_sines_and_cosines():
    table = sincos_1d(3, 4)
    assert torch.allclose(table[2], torch.tensor([np.sin(2), np.sin(0.02), np.cos(2),
                                                  np.cos(0.02)], dtype=torch.float32))
    grid = sincos_2d(2, 8)
    assert torch.equal(grid[2, :4], sincos_1d(2, 4)[1])  # index 2 is row 1, column 0
    assert torch.equal(grid[2, 4:], sincos_1d(2, 4)[0])


@pytest.mark.parametrize(("change", "sentence"), [
    ({"vocab_size": 0}, "needs a vocab_size"),
    ({"kind": "pixels"}, "can be an input only"),
    ({"max_tokens": 0}, "max_tokens must be positive"),
])
def test_specifications_that_cannot_be_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        ModalitySpec(**{"name": "x", "kind": "img", "max_tokens": 4, "vocab_size": 3, **change})


def load_bytes(data: bytes) -> dict:
    from safetensors.torch import load

    return load(data)


def save_bytes(tensors: dict) -> bytes:
    from safetensors.torch import save

    return save(tensors)
