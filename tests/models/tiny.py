"""A network of a few thousand parameters with every kind of modality, and a batch for it."""

from __future__ import annotations

import numpy as np
import torch

from models.fourm.model import FourM
from models.fourm.spec import FourMConfig, ModalitySpec

SPECS = (
    ModalitySpec(name="rgb@32", kind="pixels", max_tokens=4, is_target=False),
    ModalitySpec(name="tok_depth@32", kind="img", max_tokens=4, vocab_size=11),
    ModalitySpec(name="tok_rgb@32", kind="img", max_tokens=4, vocab_size=13),
    ModalitySpec(name="caption", kind="seq", max_tokens=6, vocab_size=17),
    ModalitySpec(name="vector", kind="img", max_tokens=2, vocab_size=7, learned_positions=True),
)
CONFIG = FourMConfig(modalities=SPECS, dim=16, encoder_depth=1, decoder_depth=2, num_heads=2)


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
