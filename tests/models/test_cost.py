"""The cost formulas against what the network really does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.fourm import model as network
from models.fourm.cost import Load, activation_bytes, expected_load, forward_flops, train_flops
from models.fourm.draws import Draws
from models.fourm.masking import Component, Mixture, Samples, mask_batch
from models.fourm.spec import FourMConfig, ModalitySpec

SPECS = (
    ModalitySpec(name="rgb@64", kind="pixels", max_tokens=16, is_target=False),
    ModalitySpec(name="tok_depth@64", kind="img", max_tokens=16, vocab_size=300),
    ModalitySpec(name="caption", kind="seq", max_tokens=20, vocab_size=400),
)
MASKS = Mixture(components=(
    Component(inputs={"rgb@64": 1.0, "tok_depth@64": 1.0}, num_inputs=(16, 16),
              targets={"tok_depth@64": 1.0, "caption": 1.0}, num_targets=(20, 20)),
))
SIZE = 4


@pytest.fixture(params=[True, False], ids=["gated", "plain"])
def case(request):
    """A network, a batch and its load."""
    config = FourMConfig(modalities=SPECS, dim=64, encoder_depth=3, decoder_depth=2, num_heads=4,
                         gated_mlp=request.param)
    rng = np.random.default_rng(0)
    ids = rng.integers(204, 400, (SIZE, 20))
    samples = Samples(
        grids={"tok_depth@64": rng.integers(0, 300, (SIZE, 16))},
        sequences={"caption": (ids, np.full(SIZE, 20))},
        pixels={"rgb@64": rng.integers(0, 255, (SIZE, 16, 768)).astype(np.uint8)},
    )
    batch = mask_batch(config, samples, MASKS, Draws(0, 0, SIZE))
    # The loss computes the rows that pad it, too.
    rows = {m.name: len(part) / SIZE
            for m, part in zip(config.modalities, batch.by_modality(), strict=True) if m.is_target}
    dense = {"rgb@64": float((batch.enc_mod == config.index("rgb@64")).sum()) / SIZE}
    return network.FourM(config), batch, Load(16, 20, rows, dense)


def test_operations_are_those_that_torch_counts(case):
    model, batch, load = case
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch)
    assert SIZE * forward_flops(model.config, load) == pytest.approx(
        counter.get_total_flops(), rel=1e-6)
    assert train_flops(model.config, load) == 3 * forward_flops(model.config, load)


def test_activations_are_within_a_fifth_of_what_autograd_keeps(case):
    model, batch, load = case
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    estimate = SIZE * activation_bytes(model.config, load, compute_bytes=4)
    assert estimate == pytest.approx(found, rel=0.2)
    less = activation_bytes(model.config, load, compute_bytes=4, recompute=True)
    assert less < estimate / SIZE


def test_expected_loads_follow_weights_and_concentrations():
    config = FourMConfig(modalities=SPECS)
    parts = (
        Component(inputs={"rgb@64": 1.0}, targets={"caption": 1.0}, weight=3,
                  num_inputs=(8, 16), num_targets=(10, 10)),
        Component(inputs={"caption": 1.0}, targets={"caption": 1.0, "tok_depth@64": 3.0},
                  num_inputs=(4, 4), num_targets=(20, 20)),
    )
    load = expected_load(config, Mixture(components=parts, per_batch=True))
    assert (load.inputs, load.targets) == (0.75 * 16 + 0.25 * 4, 0.75 * 10 + 0.25 * 20)
    assert load.rows == {"caption": 0.75 * 10 + 0.25 * 5, "tok_depth@64": 0.25 * 15}
    assert load.dense == {"rgb@64": 0.75 * 12}
    assert expected_load(config, Mixture(components=parts)).tokens == 16 + 20
