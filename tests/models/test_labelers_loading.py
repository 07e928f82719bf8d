"""What a labeler loads: a whole network of the folder that is named, and none of its code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers as hf

from models.labelers import LabelerSpec, load_labeler, weights_revision

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def spec(kind: str, folder: Path, *outputs: str) -> LabelerSpec:
    return LabelerSpec(kind, outputs or (kind,), str(folder), device="cpu", precision="fp32")


def test_a_backbone_without_the_head_that_labels_is_refused(tmp_path: Path) -> None:
    blocks = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4}
    config = hf.SegformerConfig(**blocks, decoder_hidden_size=8, num_labels=3)
    hf.SegformerModel(config).save_pretrained(tmp_path)
    hf.SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no weights of 'decode_head', which Segformer"):
        load_labeler(spec("semseg", tmp_path))


def test_a_part_may_be_missing_whose_output_nobody_asks_for(tmp_path: Path) -> None:
    config = hf.ViTConfig(**TINY, intermediate_size=32, image_size=32, patch_size=8)
    hf.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    load_labeler(spec("dinov2", tmp_path, "dinov2"))
    with pytest.raises(ValueError, match="holds no weights of 'pooler'"):
        load_labeler(spec("dinov2", tmp_path, "dinov2", "dinov2_global"))


def test_code_of_a_repository_is_not_run_whatever_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, proof = tmp_path / "network", tmp_path / "has-run"
    folder.mkdir()
    about = {"model_type": "its-own", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "code.py").write_text(
        f"from transformers import PretrainedConfig\nopen({str(proof)!r}, 'w').close()\n"
        "class Config(PretrainedConfig):\n    model_type = 'its-own'\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="custom code"):
        load_labeler(spec("semseg", folder))
    assert not proof.exists()


def test_the_revision_of_a_folder_is_that_of_its_weights_alone(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = weights_revision(spec("depth", tmp_path))
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "model.metadata").write_text("1763840000.1")
    (tmp_path / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert weights_revision(spec("depth", tmp_path)) == before
