"""SAM, poses and T5 on tiny checkpoints of the real classes, and on networks that say known things.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import segment_anything
import torch
import transformers as hf
from safetensors.torch import save_file
from segment_anything import modeling as sam_modules

from models import modalities
from models.labelers import LabelerSpec, load_labeler, preset
from models.labelers.base import Labeler
from models.modalities.human_poses import KEYPOINTS

ANY = {"min_iou": -100.0, "min_stability": -1.0, "points_per_side": 3, "points_per_batch": 4}
SAM = ("sam_instance", "sam_edge")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def load(kind: str, folder: Path, *outputs: str, **options: Any) -> Labeler:
    return load_labeler(
        LabelerSpec(kind, outputs or (kind,), str(folder), batch_size=2, precision="fp32",
                    device="cpu", options=options)
    )  # fmt: skip


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- SAM --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sam(tmp_path_factory.mktemp("sam"))


def write_sam(folder: Path) -> Path:
    vision = {
        "hidden_size": 16, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 64, "patch_size": 16, "window_size": 2, "global_attn_indexes": [1],
        "num_pos_feats": 8, "mlp_dim": 16,
    }  # fmt: skip
    prompt = {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 16, "iou_head_hidden_dim": 16,
    }  # fmt: skip
    config = hf.SamConfig(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder
    )
    hf.SamModel(config).save_pretrained(folder)
    hf.SamImageProcessor(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16}, mask_pad_size={"height": 16, "width": 16},
    ).save_pretrained(folder)  # fmt: skip
    return folder


class KnownMasks:
    """In place of SAM: answers every point with the same three masks of 16 x 16."""

    def __init__(self, *masks: tuple[slice, slice], scores: tuple[float, ...]) -> None:
        self.logits = torch.full((3, 16, 16), -10.0)
        for number, (rows, columns) in enumerate(masks):
            self.logits[number, rows, columns] = 10.0
        self.scores = torch.tensor(scores)

    def get_image_embeddings(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pixels), 1, 1, 1)

    def __call__(self, image_embeddings: Any, input_points: torch.Tensor) -> SimpleNamespace:
        assert input_points.shape[0] == 1
        assert input_points.shape[2:] == (1, 2)
        points = input_points.shape[1]
        return SimpleNamespace(
            pred_masks=self.logits.expand(1, points, 3, 16, 16),
            iou_scores=self.scores.expand(1, points, 3),
        )


def test_sam_writes_masks_inside_their_boxes_and_edges_of_the_image_s_size(sam):
    images = [picture(40, 80), picture(1, 1), picture(40, 80)]
    found = load("sam", sam, *SAM, **ANY).label(images)
    for image, value, edge in zip(images, found["sam_instance"], found["sam_edge"], strict=True):
        assert value["size"] == list(image.shape[:2])
        assert edge.shape == image.shape[:2]
        assert edge.dtype == np.uint8
        for each in value["instances"]:
            x0, y0, x1, y1 = each["box"]
            assert each["mask"].shape == (y1 - y0, x1 - x0)
            assert each["mask"].any()
        modality = modalities.get("sam_instance")
        again = modality.decode(modality.encode(value))
        assert modality.encode(again) == modality.encode(value)
    assert found["sam_instance"][0]["instances"]


def test_each_object_is_found_once_at_its_place_however_many_points_hit_it(sam, monkeypatch):
    labeler = load("sam", sam, *SAM, points_per_side=4)
    # The picture of 40 x 80 fills the upper half of what the network sees.
    known = KnownMasks(
        (slice(2, 6), slice(2, 6)), (slice(1, 7), slice(9, 15)), (slice(2, 6), slice(2, 7)),
        scores=(0.97, 0.99, 0.9),
    )  # fmt: skip
    monkeypatch.setattr(labeler.network, "model", known)
    found = labeler.label([picture(40, 80)])
    instances = found["sam_instance"][0]["instances"]
    assert [round(each["score"], 2) for each in instances] == [0.99, 0.97]
    assert np.abs(np.array(instances[0]["box"]) - [45, 5, 75, 35]).max() <= 2
    assert np.abs(np.array(instances[1]["box"]) - [10, 10, 30, 30]).max() <= 2
    edge = found["sam_edge"][0]
    assert edge[11:29, 8:13].max(1).min() > 50  # a border all along the left side
    assert edge[15:25, 15:25].max() == 0
    assert edge[:, 36:42].max() == 0


def test_masks_that_are_unsure_unstable_too_small_or_too_many_are_left_out(sam, monkeypatch):
    known = KnownMasks(
        (slice(0, 4), slice(0, 4)), (slice(0, 2), slice(10, 12)), (slice(4, 8), slice(10, 16)),
        scores=(0.9, 0.95, 0.5),
    )  # fmt: skip
    known.logits[0, 0:8, 0:8] = torch.maximum(known.logits[0, 0:8, 0:8], torch.tensor(-0.5))

    def count(**options: Any) -> int:
        labeler = load("sam", sam, "sam_instance", points_per_side=2, **options)
        monkeypatch.setattr(labeler.network, "model", known)
        return len(labeler.label([picture(32, 64)])["sam_instance"][0]["instances"])

    assert count() == 1
    assert count(min_stability=0.0) == 2
    assert count(min_stability=0.0, min_iou=0.4) == 3
    assert count(min_stability=0.0, min_iou=0.4, max_instances=2) == 2
    assert count(min_area=10_000) == 0


def test_a_picture_without_objects_has_no_instances_and_no_edges(sam):
    found = load("sam", sam, *SAM, **{**ANY, "min_iou": 1e9}).label([picture(20, 30)])
    assert found["sam_instance"] == [{"size": [20, 30], "instances": []}]
    assert not found["sam_edge"][0].any()
    assert found["sam_edge"][0].shape == (20, 30)


def test_options_of_sam_out_of_range_are_refused(sam):
    with pytest.raises(ValueError, match="points_per_side=0 of SAM"):
        load("sam", sam, *SAM, points_per_side=0)


@pytest.fixture(scope="module", params=[".pth", ".safetensors"])
def published_sam(tmp_path_factory: pytest.TempPathFactory, request: Any) -> Path:
    """A checkpoint with the published names of tensors, of a network as small as can be."""
    torch.manual_seed(1)
    folder: Path = tmp_path_factory.mktemp("published")
    tensors = tiny_sam().state_dict()
    if request.param == ".pth":
        torch.save(tensors, folder / "sam.pth")
    else:
        save_file(tensors, folder / "sam.safetensors")
    return folder


def tiny_sam(checkpoint: None = None) -> sam_modules.Sam:
    """A network of the package that sees 64 x 64 pixels."""
    encoder = sam_modules.ImageEncoderViT(
        img_size=64, patch_size=16, embed_dim=16, depth=2, num_heads=2, out_chans=16,
        use_rel_pos=True, window_size=2, global_attn_indexes=(1,),
    )  # fmt: skip
    prompts = sam_modules.PromptEncoder(
        embed_dim=16, image_embedding_size=(4, 4), input_image_size=(64, 64), mask_in_chans=4
    )
    decoder = sam_modules.MaskDecoder(
        transformer_dim=16, iou_head_hidden_dim=16, num_multimask_outputs=3,
        transformer=sam_modules.TwoWayTransformer(2, 16, num_heads=2, mlp_dim=16),
    )  # fmt: skip
    return sam_modules.Sam(encoder, prompts, decoder).eval()


def load_published(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Labeler:
    monkeypatch.setitem(segment_anything.sam_model_registry, "tiny", tiny_sam)
    (file,) = folder.iterdir()
    return load("sam", folder, *SAM, network="tiny", checkpoint=file.name, **options)


def test_the_published_network_labels_as_the_other_does(published_sam, monkeypatch):
    labeler = load_published(published_sam, monkeypatch, **ANY)
    images = [picture(40, 80), picture(1, 1), picture(40, 80)]
    found = labeler.label(images)
    for image, value, edge in zip(images, found["sam_instance"], found["sam_edge"], strict=True):
        assert value["size"] == list(image.shape[:2])
        assert edge.shape == image.shape[:2]
    assert found["sam_instance"][0]["instances"]
    first, last = found["sam_instance"][0], found["sam_instance"][2]
    encode = modalities.get("sam_instance").encode
    assert encode(first) == encode(last)


def test_the_published_network_answers_as_the_package_s_own_predictor(published_sam, monkeypatch):
    labeler = load_published(published_sam, monkeypatch)
    image = picture(64, 48)
    predictor = segment_anything.SamPredictor(labeler.network.model)
    predictor.set_image(image)
    places = torch.tensor([[[10.0, 20.0]], [[33.0, 5.0]]])
    full, scores, logits = predictor.predict_torch(
        places, torch.ones(2, 1), multimask_output=True, return_logits=True
    )
    with torch.no_grad():
        embeddings, seen = labeler.network.embed([image])
        ours, sure = labeler.network.ask(embeddings, places[None])
        assert seen == [(64, 48)]
        assert torch.allclose(ours, logits.flatten(0, 1), atol=1e-4)
        assert torch.allclose(sure, scores.flatten(), atol=1e-4)
        wide = labeler.network.full(ours, seen[0], image.shape[:2])
    assert torch.allclose(wide, full.flatten(0, 1), atol=1e-4)


def test_a_checkpoint_of_another_network_is_refused(published_sam, monkeypatch):
    with pytest.raises(ValueError, match="network='vit_x' of SAM: choose one of default"):
        load("sam", published_sam, *SAM, network="vit_x", checkpoint="a.pth")
    with pytest.raises(ValueError, match="go together"):
        load("sam", published_sam, *SAM, network="vit_h")
    wider = tiny_sam()
    wider.mask_decoder.iou_token = torch.nn.Embedding(1, 32)
    monkeypatch.setitem(segment_anything.sam_model_registry, "wider", lambda: wider)
    (file,) = published_sam.iterdir()
    with pytest.raises(ValueError, match="is no checkpoint of wider"):
        load("sam", published_sam, *SAM, network="wider", checkpoint=file.name)


def test_the_released_preset_takes_the_published_network():
    options = preset("released")["sam"].options
    assert options["network"] in segment_anything.sam_model_registry
    assert options["checkpoint"].endswith("sam_vit_h_4b8939.pth")


# --- poses ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vitpose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vitpose(tmp_path_factory.mktemp("vitpose"))


def write_vitpose(folder: Path) -> Path:
    backbone = hf.VitPoseBackboneConfig(
        image_size=(64, 48), patch_size=(16, 16), hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, out_indices=[1],
    )  # fmt: skip
    config = hf.VitPoseConfig(
        backbone_config=backbone, id2label=dict(enumerate(KEYPOINTS)),
        label2id={name: number for number, name in enumerate(KEYPOINTS)},
    )  # fmt: skip
    hf.VitPoseForPoseEstimation(config).save_pretrained(folder)
    hf.VitPoseImageProcessor(size={"height": 64, "width": 48}).save_pretrained(folder)
    return folder


def boxes(*instances: tuple[str, float, list[float]]) -> dict[str, Any]:
    return {
        "instances": [
            {"class_name": name, "score": score, "box": box} for name, score, box in instances
        ]
    }


def test_people_among_the_boxes_get_17_keypoints_best_box_first(vitpose):
    box = [0.1, 0.2, 0.5, 0.9]
    samples = [
        {"rgb": picture(60, 90), "det": boxes(
            ("dog", 0.9, box), ("person", 0.6, box), ("person", 0.4, box), ("person", 0.8, box),
        )},
        {"rgb": picture(30, 20), "det": boxes()},
        {"rgb": picture(1, 1), "det": boxes(("person", 0.9, [0.0, 0.0, 1.0, 1.0]))},
    ]  # fmt: skip
    found = load("human_poses", vitpose).label_samples(samples)["human_poses"]
    assert [[human["score"] for human in each["humans"]] for each in found] == [
        [0.8, 0.6], [], [0.9],
    ]  # fmt: skip
    modality = modalities.get("human_poses")
    for each in found:
        again = modality.decode(modality.encode(each))
        assert again == each
        points = np.array([human["keypoints"] for human in each["humans"]]).reshape(-1, 3)
        assert np.isfinite(points).all()
        assert ((points[:, 2] >= 0) & (points[:, 2] <= 1)).all()


def test_a_keypoint_lies_where_the_network_sees_it_in_the_box(vitpose, monkeypatch):
    labeler = load("human_poses", vitpose)
    heat = torch.zeros(1, 17, 16, 12)
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(12.0), indexing="ij")
    heat[:] = torch.exp(-((rows - 7.5) ** 2 + (columns - 5.5) ** 2) / 8)

    class Known:
        config = labeler.model.config

        def __call__(self, pixel_values: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(heatmaps=heat.expand(len(pixel_values), -1, -1, -1).clone())

    monkeypatch.setattr(labeler, "model", Known())
    samples = [{"rgb": picture(100, 200), "det": boxes(("person", 0.9, [0.2, 0.1, 0.6, 0.7]))}]
    (found,) = labeler.label_samples(samples)["human_poses"]
    for x, y, score in found["humans"][0]["keypoints"]:
        assert (x, y) == pytest.approx((0.4, 0.4), abs=0.06)
        assert score == pytest.approx(0.94, abs=0.07)


def test_500_people_are_cut_to_the_best_and_nobody_runs_no_network(vitpose, monkeypatch):
    crowd = boxes(*[("person", 0.5 + n / 1001, [0.0, 0.0, 1.0, 1.0]) for n in range(500)])
    labeler = load("human_poses", vitpose, max_humans=3)
    found = labeler.label_samples([{"rgb": picture(20, 20), "det": crowd}])["human_poses"]
    assert [round(h["score"], 3) for h in found[0]["humans"]] == [0.999, 0.998, 0.997]
    monkeypatch.setattr(labeler, "model", None)
    empty = labeler.label_samples([{"rgb": picture(20, 20), "det": boxes()}])
    assert empty == {"human_poses": [{"humans": []}]}


def test_a_network_of_other_keypoints_is_refused(vitpose, tmp_path):
    import json
    import shutil

    shutil.copytree(vitpose, tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] = {"0": "nose", "1": "tail"}
    config["label2id"] = {"nose": 0, "tail": 1}
    path.write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError)):
        load("human_poses", tmp_path / "other")


# --- T5 ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_t5(tmp_path_factory.mktemp("t5"))


def write_t5(folder: Path) -> Path:
    words = ["<pad>", "</s>", "<unk>", "▁a", "▁red", "▁cube", "▁", "b"]
    tokenizer = hf.T5Tokenizer(
        vocab=[(word, -float(number)) for number, word in enumerate(words)], extra_ids=0
    )
    tokenizer.save_pretrained(folder)
    config = hf.T5Config(
        vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    hf.T5EncoderModel(config).save_pretrained(folder)
    return folder


def captions(labeler: Labeler, *texts: str) -> list[np.ndarray]:
    return labeler.label_samples([{"caption": text} for text in texts])["t5_caption"]


def test_captions_become_a_row_a_token_whatever_they_are_batched_with(t5):
    labeler = load("t5_caption", t5)
    texts = ["a red cube", "", "a", "a red cube a red cube"]
    found = captions(labeler, *texts)
    assert [value.shape for value in found] == [(4, 16), (1, 16), (2, 16), (7, 16)]
    assert all(value.dtype == np.float16 for value in found)
    for text, value in zip(texts, found, strict=True):
        np.testing.assert_allclose(captions(labeler, text)[0], value, atol=2e-3)
        modality = modalities.get("t5_caption")
        assert (modality.decode(modality.encode(value)) == value).all()


def test_long_captions_are_cut_at_77_tokens_with_their_end(t5):
    labeler = load("t5_caption", t5)
    whole, cut = captions(labeler, " ".join("a" * 76), " ".join("a" * 500))
    assert whole.shape == cut.shape == (77, 16)
    np.testing.assert_allclose(whole, cut, atol=2e-3)


def test_the_values_are_those_of_the_encoder(t5):
    found = captions(load("t5_caption", t5), "red cube")[0]
    model = hf.T5EncoderModel.from_pretrained(t5)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([[4, 5, 1]])).last_hidden_state[0]
    np.testing.assert_allclose(found, expected, atol=5e-3)


def test_more_tokens_than_the_modality_holds_are_refused(t5):
    with pytest.raises(ValueError, match="max_tokens=100 of T5 captions: take 1 to 77"):
        load("t5_caption", t5, max_tokens=100)
