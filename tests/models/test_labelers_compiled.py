"""Compiled networks label as before, and nothing is compiled twice; tiny real classes."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo as dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from models.labelers import KINDS, LabelerSpec, labeler_class, load_labeler
from models.labelers.base import Labeler
from tests.models import test_labeler_caption as captions
from tests.models import test_labelers_features as features
from tests.models.test_labelers import _clip
from tests.models.test_labelers_instances import ANY, boxes, write_sam, write_t5, write_vitpose
from tests.models.test_labelers_mixed import checkpoint, difference

PERSON = boxes(("person", 0.9, [0.1, 0.1, 0.8, 0.9]))
"""One person in each picture."""
Write = Callable[[Path], Any]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Counts the graphs that are compiled, instead of making machine code of them."""
    dynamo.reset()
    found = CompileCounterWithBackend("eager")
    compile_it = torch.compile

    def counting(function: Any, **options: Any) -> Any:
        return compile_it(function, **{**options, "backend": found})

    monkeypatch.setattr(torch, "compile", counting)
    monkeypatch.setattr("models.labelers.base.check_compiler", lambda device: None)
    yield found
    dynamo.reset()


def samples(count: int) -> list[dict[str, Any]]:
    """Pictures of two sizes, each with a person and a caption of its own length."""
    rng = np.random.default_rng(0)
    return [
        {"rgb": rng.integers(0, 256, (30 + 10 * (n % 2), 40, 3), dtype=np.uint8), "det": PERSON,
         "caption": "a " * n}
        for n in range(count)
    ]  # fmt: skip


def flat(value: Any) -> np.ndarray:
    """A label as numbers."""
    if isinstance(value, dict) and "humans" in value:
        return np.array([human["keypoints"] for human in value["humans"]])
    if isinstance(value, dict):
        return np.array([each["box"] for each in value["instances"]], np.float64)
    return np.asarray(value)


NETWORKS: dict[str, tuple[str, tuple[str, ...], Write, dict[str, Any]]] = {
    "clip": ("clip", ("clip",), checkpoint(_clip), {}),
    "imagebind": ("imagebind", ("imagebind",), features.imagebind, {}),
    "sam": ("sam", ("sam_instance", "sam_edge"), write_sam, ANY),
    "vitpose": ("human_poses", ("human_poses",), write_vitpose, {}),
    "t5": ("t5_caption", ("t5_caption",), write_t5, {}),
}


def spec_of(network: str, folder: Path) -> LabelerSpec:
    kind, outputs, write, options = NETWORKS[network]
    write(folder)
    return LabelerSpec(
        kind, outputs, str(folder), batch_size=4, precision="fp32", device="cpu", options=options
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_a_compiled_network_labels_as_before_and_is_compiled_once_for_ragged_batches(
    tmp_path, network, counter
):
    spec, given = spec_of(network, tmp_path), samples(7)
    expected = load_labeler(spec).label_samples(given)
    labeler = load_labeler(dataclasses.replace(spec, compile=True))
    labeler.label_samples(given[:4])
    graphs = counter.frame_count
    assert graphs > 0
    labeler.label_samples(given[0::2])  # of one size
    found = labeler.label_samples(given)
    assert counter.frame_count == graphs
    for name in spec.outputs:
        assert len(found[name]) == len(given)
        for one, other in zip(found[name], expected[name], strict=True):
            assert difference(flat(one), flat(other)) < 5e-3


def test_each_shape_is_compiled_for_itself_up_to_torch_s_limit_and_others_run_as_they_are(
    counter,
):
    labeler = Doubling(
        LabelerSpec("depth", ("depth",), "x", precision="fp32", device="cpu", compile=True,
                    batch_size=2)
    )  # fmt: skip
    # The limit is torch's own, which timm raises to a million where its optimizers are imported.
    with dynamo.config.patch(recompile_limit=8):
        for side in [side for side in range(4, 16) for _ in range(2)]:
            (value,) = labeler.label([np.full((side, side, 3), side, np.uint8)])["depth"]
            np.testing.assert_allclose(value, np.full((side, side), 2.0 * side), rtol=1e-6)
    assert counter.frame_count == 8


def test_the_eyes_of_a_captioner_are_compiled(tmp_path, counter):
    captions.blip(tmp_path)
    spec = dataclasses.replace(captions.spec(tmp_path, max_new_tokens=4), precision="fp32")
    pictures = [sample["rgb"] for sample in samples(7)]
    expected = load_labeler(spec).label(pictures)
    labeler = load_labeler(dataclasses.replace(spec, compile=True))
    assert labeler.label(pictures) == expected
    assert counter.frame_count == 1


def test_what_has_no_network_cannot_be_compiled():
    compiled = {kind for kind in KINDS if labeler_class(kind).compiles}
    assert set(KINDS) - compiled == {"color_palette", "canny_edge", "metadata"}
    spec = LabelerSpec("canny_edge", ("canny_edge",), "computed", compile=True, device="cpu")
    with pytest.raises(ValueError, match="'canny_edge' has no network that can be compiled"):
        load_labeler(spec)


def test_without_a_compiler_a_compiled_labeler_is_refused_before_it_is_loaded(monkeypatch):
    import torch._inductor.cpp_builder as builder

    def missing() -> str:
        raise RuntimeError("no g++")

    monkeypatch.setattr(builder, "get_cpp_compiler", missing)
    spec = LabelerSpec("depth", ("depth",), "nowhere", compile=True, device="cpu")
    with pytest.raises(ValueError, match=r"no compiler for cpu \(no g\+\+\); install g\+\+"):
        load_labeler(spec)


class Doubling(Labeler):
    """Depth is twice the mean of the colours."""

    compiles = True

    def __init__(self, spec: LabelerSpec) -> None:
        super().__init__(spec)
        self.model = self.compiled(torch.nn.Conv2d(3, 1, 1, bias=False))
        torch.nn.init.constant_(self.model.weight, 2 / 3)

    def predict(self, images: Any) -> dict[str, list[Any]]:
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().contiguous()
        return {"depth": list(self.model(pixels)[:, 0].numpy())}


def test_a_compilation_that_fails_is_told_and_the_network_runs_as_it_is(monkeypatch, caplog):
    dynamo.reset()
    compile_it = torch.compile

    def broken(graph: Any, inputs: Any) -> Any:
        raise OSError("kernel.so: file too short")

    monkeypatch.setattr(
        torch, "compile", lambda call, **options: compile_it(call, **options, backend=broken)
    )
    monkeypatch.setattr("models.labelers.base.check_compiler", lambda device: None)
    labeler = Doubling(LabelerSpec("depth", ("depth",), "x", batch_size=2, device="cpu",
                                   precision="fp32", compile=True))  # fmt: skip
    with caplog.at_level("WARNING", "fourm.label"):
        values = labeler.label([np.full((6, 5, 3), level, np.uint8) for level in (1, 7, 9)])
    assert [float(value.mean()) for value in values["depth"]] == pytest.approx([2, 14, 18])
    assert caplog.text.count("depth: goes on uncompiled") == 1
    assert "file too short" in caplog.text
    dynamo.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_machine_code_labels_as_the_network_does():
    dynamo.reset()
    labeler = Doubling(LabelerSpec("depth", ("depth",), "x", batch_size=2, device="cpu",
                                   precision="fp32", compile=True))  # fmt: skip
    pictures = [np.full((6, 5, 3), level, np.uint8) for level in (1, 7, 9)]
    for level, value in zip((1, 7, 9), labeler.label(pictures)["depth"], strict=True):
        np.testing.assert_allclose(value, np.full((6, 5), 2.0 * level), rtol=1e-6)
