"""What a batch asks of 4M in floating-point operations, and what a device could do.

Counted as in `models.fourm.cost`, over used slots. A training step is three forward passes; what
is computed anew to save memory does not count. Utilisation is that over the seconds of the step
and the device's peak.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from models.fourm.cost import block_flops

if TYPE_CHECKING:
    import torch

    from infra.machine import Products
    from models.fourm.batch import Batch
    from models.fourm.spec import FourMConfig

# Dense bf16 and fp32 peaks in TFLOP/s from NVIDIA's data sheets; the first that fits counts.
_GPUS = {
    "B200": (2250.0, 75.0), "H100 PCIe": (756.0, 51.0), "H100 NVL": (835.0, 60.0),
    "H200": (989.0, 67.0), "H100": (989.0, 67.0), "L40S": (362.0, 91.6), "A100": (312.0, 19.5),
    "A10G": (70.0, 35.0), "A10": (125.0, 31.2), "L4": (121.0, 30.3),
}  # fmt: skip


@dataclass(frozen=True)
class Load:
    """What one batch holds: used tokens of inputs and targets per modality, slots of both whether
    used or not, and operations of the forward pass (0 = not known)."""

    tokens: dict[str, int] = field(default_factory=dict)
    slots: int = 0
    flops: float = 0.0


def fourm_load(config: FourMConfig, batch: Batch) -> Load:
    """The load of a batch on the CPU for a network of `config`."""
    specs = config.modalities
    enc, dec = batch.enc_mod.numpy(), batch.dec_mod.numpy()
    read = np.bincount(enc.ravel() + 1, minlength=len(specs) + 1)[1:]
    written = np.array(batch.counts)
    n, m = (enc >= 0).sum(1, dtype=float), (dec >= 0).sum(1, dtype=float)
    d = config.dim
    inputs = sum(2 * int(t) * s.dense_width * d for s, t in zip(specs, read, strict=True))
    heads = sum(2 * int(r) * s.vocab_size * d for s, r in zip(specs, written, strict=True))
    flops = block_flops(config, n, m).sum() + inputs + heads
    tokens: dict[str, int] = {}
    for spec, count in zip(specs, read + written, strict=True):
        name = spec.name.split("@")[0]  # of all resolutions together
        tokens[name] = tokens.get(name, 0) + int(count)
    return Load(tokens, enc.size + dec.size, float(flops))


def peak_flops(device: torch.device, products: Products) -> float:
    """Most operations a second of `device`: of a known GPU from its data sheet, of a CPU as
    measured on square matrices with torch's present threads; 0 where it is not known."""
    import torch

    from infra.machine import matmul_flops

    if device.type == "cpu":
        return matmul_flops(products, torch.get_num_threads())
    name = torch.cuda.get_device_name(device)
    # "L4" is no part of "L40", nor "A10" of "A1000".
    bf16, fp32 = next((peaks for part, peaks in _GPUS.items()
                       if re.search(rf"{part}(?![0-9A-Z])", name)), (0.0, 0.0))
    # All of these have half of bf16's rate in TF32.
    return {"bf16": bf16, "tf32": bf16 / 2, "fp32": fp32}[products] * 1e12
