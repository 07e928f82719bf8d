"""Labelers on a GPU: pictures, networks and results on the same device; see `tests.pretend_gpu`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from models.labelers import LabelerSpec
from models.labelers.registry import load_labeler, preset
from tests.models.test_labelers import _eomt, _mask2former, _tipsv2
from tests.models.test_labelers_compiled import NETWORKS, flat, samples, spec_of
from tests.models.test_labelers_mixed import checkpoint, difference
from tests.pretend_gpu import gpu

SHIPPED = ("depth", "normal", "semseg", "det", "caption", "clip", "dinov2")
TINY: dict[str, tuple[str, Callable[[], tuple[Any, Any]]]] = {
    "mask2former": ("semseg", _mask2former), "eomt": ("semseg", _eomt),
    "tipsv2": ("normal", _tipsv2),
}  # fmt: skip
QUICK = ("clip", "vitpose")
"""The others take minutes together."""


def _spec(network: str, folder: Any) -> LabelerSpec:
    if network in SHIPPED:
        return preset("scenes")[network]
    if network in NETWORKS:
        return spec_of(network, folder)
    kind, build = TINY[network]
    checkpoint(build)(folder)
    return LabelerSpec(kind, (kind,), str(folder), batch_size=2)


@pytest.mark.parametrize("network", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in dict.fromkeys([*SHIPPED, *NETWORKS, *TINY])
])  # fmt: skip
def test_labels_of_a_gpu_are_those_of_the_cpu(tmp_path, network: str) -> None:
    spec = dataclasses.replace(_spec(network, tmp_path), precision="fp32", device="cpu")
    rng = np.random.default_rng(0)
    given = [{**sample, "rgb": rng.integers(0, 256, (*size, 3), np.uint8)}
             for sample, size in zip(samples(3), ((96, 96), (64, 80), (96, 96)), strict=True)]
    wanted = load_labeler(spec).label_samples(given)
    with gpu():
        found = load_labeler(dataclasses.replace(spec, device="cuda")).label_samples(given)
        rounded = load_labeler(
            dataclasses.replace(spec, device="cuda", precision="auto")
        ).label_samples(given)
    for name in spec.outputs:
        assert len(rounded[name]) == len(given)
        for one, other in zip(found[name], wanted[name], strict=True):
            assert type(one) is type(other)
            # Pictures are resized in other steps there: of noise other words and boxes are found.
            if network not in ("caption", "det"):
                assert difference(flat(one), flat(other)) < 0.3
