"""torch.compile takes the network whole, once for all batches of one shape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch._dynamo as dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from models.fourm.batch import Batch, from_released
from models.fourm.model import FourM, Losses
from models.fourm.spec import FourMConfig, ModalitySpec

SPECS = (
    ModalitySpec(name="rgb@32", kind="pixels", max_tokens=4, is_target=False),
    ModalitySpec(name="tok_depth@32", kind="img", max_tokens=4, vocab_size=11),
    ModalitySpec(name="vector", kind="img", max_tokens=2, vocab_size=7, learned_positions=True),
    ModalitySpec(name="caption", kind="seq", max_tokens=6, vocab_size=17),
)
CONFIG = FourMConfig(modalities=SPECS, dim=16, encoder_depth=1, decoder_depth=1, num_heads=2)


def make_batch(seed: int, leave_out: str = "") -> Batch:
    """Two samples in the same slots whatever they hold: how many tokens of what differs."""
    rng, entries = np.random.default_rng(seed), {}
    for spec in SPECS:
        n = 2 * (spec.max_tokens + 1) if spec.kind == "seq" else spec.max_tokens
        hidden = rng.random((2, 2, n)) < (1.0 if spec.name == leave_out else 0.5)
        values = rng.integers(0, spec.vocab_size or 2, (2, n))
        if spec.kind == "pixels":
            values = rng.standard_normal((2, 3, 32, 32)).astype(np.float32)
        entries[spec.name] = {"tensor": values, "input_mask": hidden[0], "target_mask": hidden[1],
                              "decoder_attention_mask": np.ones((2, n), np.int32)}
    return from_released(entries, CONFIG, 12, 10).to(torch.device("cpu"))


def gradients(model: FourM, losses: Losses) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses.total.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    dynamo.reset()
    yield
    dynamo.reset()


def test_one_graph_serves_all_batches_of_a_shape_and_changes_no_number():
    torch.manual_seed(0)
    model = FourM(CONFIG)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    seen = set()
    for batch in [make_batch(0), make_batch(1), make_batch(2, "vector"), make_batch(3, "rgb@32")]:
        seen.add((batch.counts, len(batch.dense["rgb@32"].slots)))
        expected, found = model(batch), compiled(batch)
        assert torch.allclose(found.total, expected.total, atol=1e-6)
        assert found.per_modality.keys() == expected.per_modality.keys()
        wanted, got = gradients(model, expected), gradients(model, found)
        for name, value in wanted.items():
            assert torch.allclose(value, got[name], atol=1e-6), name
    assert len(seen) == 4
    assert counter.frame_count == 1


def test_a_batch_that_was_not_moved_compiles_without_a_break():
    model = FourM(CONFIG)
    batch = replace(make_batch(0), parts=())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(batch).total, model(batch).total, atol=1e-6)
