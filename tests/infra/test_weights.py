"""Files of tensors of others: read, or refused by their name."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from infra.weights import read_pickled, read_safetensors, require_finite
from tokenizers_vq.released.checkpoint import build, read_checkpoint
from tokenizers_vq.released.shapes import Shapes

GOOD = save({"a": torch.ones(2, 3)}, metadata={"k": "v"})


@pytest.mark.parametrize("data", [
    b"", b"\x00" * 8, GOOD[:20], GOOD[:-1], struct.pack("<Q", 2**63) + GOOD[8:],
    GOOD.replace(b"F32", b"X32"), b"<html>",
])
def test_what_is_no_safetensors_is_refused_by_its_name_and_what_to_do(tmp_path, data):
    file = tmp_path / "m.safetensors"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"m\.safetensors is damaged.*download it again"):
        read_safetensors(file)


@pytest.mark.parametrize("change", [
    lambda data: b"", lambda data: b"<html>", lambda data: data[: len(data) // 2],
    lambda data: data.replace(b"FloatStorage", b"FlootStorage"),
])
def test_what_is_no_file_of_torch_is_refused_by_its_name_and_what_to_do(tmp_path, change):
    file = tmp_path / "m.pth"
    torch.save({"model": {"a": torch.ones(2)}}, file)
    assert read_pickled(file)["model"]["a"].tolist() == [1, 1]
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=r"m\.pth is damaged.*download it again"):
        read_pickled(file)


def test_a_file_that_is_not_there_is_said_so(tmp_path):
    for read in (read_safetensors, read_pickled):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(odd):
    fine = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int64)}
    require_finite(fine, "it")
    with pytest.raises(ValueError, match=r"no finite numbers, in bad: .*take another"):
        require_finite({**fine, "bad": torch.tensor([1, odd], dtype=torch.bfloat16)}, "it")


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000])
def test_a_description_that_is_no_object_is_refused_by_its_name(tmp_path, text):
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(("stored", "words"), [
    ([1], "holds something else, not 'model'"), ({"other": 1}, "holds other, not 'model'"),
    ({"model": 3}, "no tensors by name"), ({"model": {"a": "text"}}, "no tensors by name"),
    ({"model": {"a": torch.ones(1)}, "args": 3}, "args are no settings"),
])
def test_a_training_checkpoint_of_other_contents_is_refused(tmp_path: Path, stored, words):
    file = tmp_path / "m.pth"
    torch.save(stored, file)
    with pytest.raises(ValueError, match=words):
        read_checkpoint(file)


def test_settings_that_make_no_network_are_a_refusal_and_no_error_of_python():
    tensors = {"proj.weight": torch.ones(1), "_codebook.embed": torch.ones(())}
    tensors |= {"quant_proj.weight": torch.ones(2, 2), "encoder.proj.weight": torch.ones(2, 2, 2)}
    with pytest.raises(ValueError, match=r"lacks the tensor|make no network"):
        build({"norm_codes": []}, tensors)
    with pytest.raises(ValueError, match="make no network: AttributeError"):
        build(None, tensors)  # type: ignore[arg-type]


def test_a_list_of_a_thousand_million_modules_is_refused_and_never_built():
    shapes = Shapes({"blocks.0.w": torch.ones(1), "blocks.1000000000.w": torch.ones(1)})
    with pytest.raises(ValueError, match=r"names blocks\.1000000000, but few before it"):
        shapes.count("blocks")
    assert Shapes({"convs.0.w": torch.ones(1), "convs.2.w": torch.ones(1)}).count("convs") == 3
