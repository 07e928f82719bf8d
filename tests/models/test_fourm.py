"""Contracts of the 4M network: token-first computation, masks, losses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from infra.machine import fp32_products
from models.fourm.attention import additive, attention, key_mask, target_mask
from models.fourm.batch import from_released
from models.fourm.embeddings import sincos_1d, sincos_2d
from models.fourm.model import LayerCache
from models.fourm.spec import ModalitySpec
from tests.models.tiny import CONFIG, make, released

VECTORS = Path(__file__).parent / "vectors" / "fourm_tiny.safetensors"


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
    model.config = dataclasses.replace(CONFIG, loss="token_by_vocab")
    weights = counts * torch.tensor([m.vocab_size for m in CONFIG.targets])
    assert torch.allclose(model(batch).total, (values * weights).sum() / weights.sum())


def test_sequences_are_causal_and_modalities_do_not_see_each_other():
    modality = torch.tensor([[0, 0, 2, 2, 2, -1]])
    until = torch.tensor([[2, 2, 3, 4, 5, 0]])
    allowed = target_mask(modality, until)[0].int().tolist()
    assert allowed[0] == allowed[1] == [1, 1, 0, 0, 0, 0]
    assert [row[2:5] for row in allowed[2:5]] == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("dtype", "rounded"), [(torch.bfloat16, False), (torch.float32, True)])
def test_attention_backends_agree_in_values_and_gradients(dtype, rounded, masked):
    draw = torch.Generator().manual_seed(0)
    given = [torch.randn(2, length, 2, 8, generator=draw) for length in (3, 5, 5)]
    seen = key_mask(torch.tensor([[0, 1, 2, -1, -1], [0, 0, 0, 0, -1]]))
    found = []
    for kind, less in ((torch.float32, False), (dtype, rounded)):
        parts = [x.clone().requires_grad_() for x in given]
        with fp32_products("cpu", rounded=less):
            out = attention(*(x.to(kind).transpose(1, 2) for x in parts),
                            additive(seen, kind) if masked else None)
            out.square().sum().backward()
        found.append((out.float(), *(x.grad for x in parts)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.1, rtol=0.05)


def test_products_keep_the_mask_they_are_given():
    mask = additive(key_mask(torch.tensor([[0, 1, -1]])), torch.bfloat16).expand(1, 1, 3, 3)
    mask, kept = mask.contiguous(), mask.clone()
    attention(*torch.randn(3, 1, 1, 3, 8).bfloat16(), mask)
    assert torch.equal(mask, kept)


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
