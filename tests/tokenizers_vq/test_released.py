"""Released tokenizers: checkpoints in every form, what is refused, value contracts, bottlenecks."""

import argparse
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import tokenizers_vq
from tokenizers_vq.codec import ValueCodec
from tokenizers_vq.diffusion import Diffusion
from tokenizers_vq.released.checkpoint import build
from tokenizers_vq.released.codebooks import Memcodes, MovingCodebook
from tokenizers_vq.released.contracts import contract, modality_of
from tokenizers_vq.released.network import ReleasedShape, ReleasedVQ, Sampling
from tokenizers_vq.released.unet import PatchedUNet
from tokenizers_vq.released.uvit import UViT
from tokenizers_vq.released.vit import BottleneckMLP, ViTDecoder, ViTEncoder
from tokenizers_vq.tokenizer import fingerprint, load_tokenizer

torch.set_num_threads(1)
VIT = {"width": 16, "depth": 1, "heads": 2, "hidden": 32, "grid": (2, 2)}
HEAD_WIDTH = 8
CONFIG = {"norm_codes": True, "enc_type": "vit_tiny", "threshold_ema_dead_code": 0.25}
DIFFUSION = {"beta_schedule": "linear", "prediction_type": "sample", "zero_terminal_snr": True}


def _net(family: str) -> ReleasedVQ:
    """A small random network of a family, image 16 px, 2 x 2 tokens."""
    torch.manual_seed(0)
    channels = {"rgb": 3, "semseg": 4, "human_poses": 12, "sam_instance": 1}.get(family, 1)
    patch, classes = 8, 6 if family == "semseg" else 0
    if family == "human_poses":
        shape = ReleasedShape(vocab_size=16, channels=12, patch=1, grid=1, codebooks=4,
                              num_classes=0)
        sizes = {"width": 8, "depth": 2, "hidden": 16}
        return ReleasedVQ(
            shape, encoder=BottleneckMLP(channels_in=12, channels_out=8, **sizes), latent=8,
            quantize=Memcodes(4, 16, 2), features=(8, 8),
            decoder=BottleneckMLP(channels_in=8, channels_out=12, **sizes),
        )
    shape = ReleasedShape(vocab_size=32, channels=channels, patch=patch, grid=2, codebooks=1,
                          num_classes=classes)
    encoder = ViTEncoder(channels=channels, patch=patch, post_hidden=32, **VIT)
    common = {"encoder": encoder, "quantize": MovingCodebook(32, 8), "latent": 8}
    if family in ("depth", "normal"):
        return ReleasedVQ(shape, decoder=_denoiser(family), features=(16, 0),
                          diffusion=Diffusion(), **common)
    decoder = ViTDecoder(channels=classes or channels, patch=patch, post_hidden=32,
                         out_blocks=2 if family == "sam_instance" else 0, **VIT)
    return ReleasedVQ(shape, decoder=decoder, features=(16, 16), **common)


def _denoiser(family: str) -> torch.nn.Module:
    if family == "depth":
        return PatchedUNet(channels=1, condition=8, patch=4, width=32, multipliers=(1, 2),
                           blocks=1, attention_levels=(1,))
    return UViT(channels=1, condition=8, patch=4, widths=(32, 32), blocks=1,
                down_before_middle=True, middle_width=16, middle_depth=1, middle_heads=2,
                middle_hidden=32, grid=(2, 2))


def _write(folder, family: str) -> ReleasedVQ:
    net = _net(family).eval()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | DIFFUSION))
    save_file({k: v.contiguous() for k, v in net.state_dict().items()},
              folder / "model.safetensors")
    return net


def _load(folder, modality: str):
    return tokenizers_vq.load(folder, modality=modality, head_width=HEAD_WIDTH)


def _input(family: str) -> torch.Tensor:
    torch.manual_seed(1)
    if family == "semseg":
        return torch.randint(0, 6, (2, 16, 16))
    if family == "human_poses":
        return torch.randn(2, 12, 1, 1)
    return torch.randn(2, 3 if family == "rgb" else 1, 16, 16)


@pytest.mark.parametrize("family", ["rgb", "semseg", "human_poses", "sam_instance", "depth"])
def test_a_checkpoint_loads_to_the_network_that_wrote_it(tmp_path, family):
    net, x = _write(tmp_path / "c", family), _input(family)
    loaded = _load(tmp_path / "c", family).net
    loaded.sampling = net.sampling = Sampling(steps=2)
    with torch.no_grad():
        tokens = net.encode(x)
        assert torch.equal(loaded.encode(x), tokens)
        assert torch.allclose(loaded.decode(tokens), net.decode(tokens), atol=1e-5)
        if family in ("rgb", "semseg"):
            assert torch.allclose(loaded(x)[0], loaded.decode(tokens), atol=1e-5)
    assert loaded.config.num_tokens == tokens[0].numel()


def test_a_class_that_a_tokenizer_does_not_know_is_unlabelled_to_it() -> None:
    """On a GPU an id beyond the table would end the process, not the sample."""
    net, ids = _net("semseg").eval(), _input("semseg")
    with torch.no_grad():
        assert torch.equal(net.encode(ids + 6), net.encode(torch.zeros_like(ids)))


def test_the_transformer_in_a_uvit_loads_under_either_name_of_its_convolution(tmp_path):
    net = _net("normal").eval()
    state = net.state_dict()
    sample = torch.randn(2, 1, 16, 16), torch.tensor([3, 900]), torch.randn(2, 8, 2, 2)
    with torch.no_grad():
        expected = net.denoise(*sample, torch.zeros(2, 2, 2, dtype=torch.bool))
    names = [name for name in state if ".downsample_mid.conv." in name]
    for name in names:
        state[name.replace("conv", "Conv2d_0")] = state.pop(name)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(DIFFUSION))
    loaded = _load(tmp_path, "depth").net
    with torch.no_grad():
        assert torch.allclose(loaded.denoise(*sample), expected, atol=1e-5)
        hidden = loaded.denoise(*sample, torch.ones(2, 2, 2, dtype=torch.bool))
    assert not torch.allclose(hidden, expected)


def test_tensors_that_do_not_fit_are_refused_by_name():
    state = _net("rgb").state_dict()
    lacking = {k: v for k, v in state.items() if k != "encoder.blocks.0.attn.proj.bias"}
    with pytest.raises(ValueError, match=r"lacks encoder\.blocks\.0\.attn\.proj\.bias$"):
        build(CONFIG, lacking, head_width=HEAD_WIDTH)
    with pytest.raises(ValueError, match=r"holds besides discriminator\.weight$"):
        build(CONFIG, {**state, "discriminator.weight": torch.zeros(1)}, head_width=HEAD_WIDTH)
    wrong = {**state, "quant_proj.bias": torch.zeros(9)}
    with pytest.raises(ValueError, match=r"another shape quant_proj\.bias \(9,\), not \(8,\)"):
        build(CONFIG, wrong, head_width=HEAD_WIDTH)
    del lacking["quant_proj.weight"]
    with pytest.raises(ValueError, match=r"lacks the tensor quant_proj\.weight"):
        build(CONFIG, lacking, head_width=HEAD_WIDTH)
    with pytest.raises(ValueError, match="conditioning='xattn'"):
        build({"conditioning": "xattn"}, state)


def test_the_configuration_may_stand_in_the_header_or_in_a_training_checkpoint(tmp_path):
    net, x = _net("rgb").eval(), _input("rgb")
    state = {name: value.contiguous() for name, value in net.state_dict().items()}
    header = {"norm_codes": "True", "patch_size_dec": "None", "enc_type": "vit_b_enc"}
    save_file(state, tmp_path / "rgb.safetensors", metadata=header)
    args = argparse.Namespace(norm_codes=True, blr=1e-4)
    averaged = {**state, "quant_proj.bias": state["quant_proj.bias"] + 1}
    torch.save({"model": state, "model_ema": averaged, "args": args}, tmp_path / "rgb.pth")
    with torch.no_grad():
        tokens = net.encode(x)
        for name in ("rgb.safetensors", "rgb.pth"):
            loaded = tokenizers_vq.load(tmp_path / name, head_width=HEAD_WIDTH)
            assert loaded.modality == "rgb"
            assert torch.equal(loaded.net.encode(x), tokens)
    ema = tokenizers_vq.load(tmp_path / "rgb.pth", head_width=HEAD_WIDTH, ema=True).net
    assert torch.equal(ema.quant_proj.bias, averaged["quant_proj.bias"])
    with pytest.raises(ValueError, match=r"\.safetensors"):
        tokenizers_vq.load(tmp_path / "rgb.bin")


def test_stored_released_tokenizers_keep_tokens_values_and_fingerprint(tmp_path):
    _write(tmp_path / "4M_tokenizers_human-poses_1k_8", "human_poses")
    tokenizer = tokenizers_vq.load(tmp_path / "4M_tokenizers_human-poses_1k_8")
    values = list(np.random.default_rng(0).normal(size=(3, 12)).astype(np.float32))
    tokens = tokenizer.encode_values(values)
    assert tokens.shape == (3, 4) == (3, tokenizer.num_tokens)
    digest = tokenizer.save(tmp_path / "stored")
    again = load_tokenizer(tmp_path / "stored")
    assert fingerprint(again.files()) == digest
    assert (again.encode_values(values) == tokens).all()
    assert again.decode_tokens(tokens)[0].shape == (12,)
    with pytest.raises(ValueError, match="human_poses: 5 tokens instead of 4"):
        again.decode_tokens(np.zeros((1, 5), int))


def test_diffusion_decodes_a_sample_alike_whatever_its_neighbours(tmp_path):
    _write(tmp_path / "depth", "depth")
    tokenizer = _load(tmp_path / "depth", "depth")
    tokens = np.random.default_rng(0).integers(0, 32, (3, 4))
    tokenizer.net.sampling = Sampling(steps=2, guidance=2.0)
    together = tokenizer.decode_output(tokens)
    alone = tokenizer.decode_output(tokens[2:])
    assert together.shape == (3, 1, 16, 16)
    assert torch.allclose(together[2:], alone, atol=1e-5)
    tokenizer.net.sampling = Sampling(steps=2)
    assert not torch.allclose(tokenizer.decode_output(tokens), together)


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("4M_tokenizers_rgb_16k_224-448", "rgb"),
        ("hub/models--EPFL-VILAB--4M_tokenizers_edge_8k_224-512/snapshots/0ab1", "canny_edge"),
        ("4M_tokenizers_CLIP-B16_8k_224-448", "clip"),
        ("4M_tokenizers_DINOv2-B14-global_8k_16_224", "dinov2_global"),
        ("4M_tokenizers_ImageBind-H14_8k_224-448", "imagebind"),
        ("4M_tokenizers_sam-instance_1k_64", "sam_instance"),
        ("4M_tokenizers_human-poses_1k_8", "human_poses"),
        ("semseg.safetensors", "semseg"),
    ],
)
def test_the_published_name_tells_the_modality(name, modality):
    assert modality_of(f"/models/{name}") == modality


def test_a_name_that_tells_nothing_and_a_network_of_other_values_are_refused():
    with pytest.raises(ValueError, match="pass modality= one of rgb, depth"):
        modality_of("/models/checkpoint")
    with pytest.raises(ValueError, match="no depth tokenizer: it takes 3 channels"):
        contract("depth", _net("rgb").config)
    with pytest.raises(ValueError, match=r"no rgb tokenizer: .* embedded classes"):
        contract("rgb", _net("semseg").config)


def test_released_contracts_shift_classes_scale_edges_and_threshold_masks():
    classes = contract("semseg", _net("semseg").config)
    ids = np.array([[[0, 4, 255]]], np.uint8)
    assert classes.to_tensor(ids).tolist() == [[[1, 5, 0]]]
    logits = F.one_hot(classes.to_tensor(ids).long(), 6).movedim(-1, 1)
    assert classes.from_tensor(logits)[0].tolist() == [[0, 4, 255]]
    edge = ValueCodec(kind="edge")
    picture = np.array([[0, 255], [51, 102]], np.uint8)
    assert edge.to_tensor(edge.pack(picture)[None])[0, 0, 0].tolist() == [-1, 1]
    assert (edge.from_tensor(edge.to_tensor(picture[None]))[0] == picture).all()
    mask = ValueCodec(kind="mask")
    assert mask.to_tensor(mask.pack(np.array([[True, False]]))[None]).tolist() == [[[[1, 0]]]]
    assert mask.from_tensor(torch.tensor([[[[0.3, -0.3]]]]))[0].tolist() == [[1, 0]]
    assert "class_offset" not in edge.to_dict()
    assert ValueCodec.from_dict(classes.to_dict()) == classes


def test_the_codebook_takes_the_nearest_direction_and_gives_the_stored_row():
    book = MovingCodebook(2, 2).eval()
    book.embed.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.1]]))
    z = torch.tensor([[0.2, 0.3], [5.0, 4.0]]).view(2, 2, 1, 1)
    quantized = book(z)
    assert quantized.tokens.flatten().tolist() == [1, 0]
    assert quantized.latents.flatten(1).tolist() == [[0.0, pytest.approx(0.1)], [3.0, 0.0]]
    euclidean = MovingCodebook(2, 2, cosine=False).eval()
    euclidean.embed.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.1]]))
    assert euclidean(z).tokens.flatten().tolist() == [1, 0]


def test_training_moves_used_codes_towards_their_latents_and_replaces_dead_ones():
    book = MovingCodebook(3, 2, decay=0.9, dead_below=0.05).train()
    book.embed.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
    book._codebook.cluster_size.copy_(torch.tensor([1.0, 1.0, 0.01]))
    z = torch.tensor([[2.0, 1.0], [0.1, 3.0]]).view(2, 2, 1, 1).requires_grad_()
    quantized = book(z)
    quantized.latents.sum().backward(retain_graph=True)
    assert (z.grad == 1).all()  # straight through
    moved = 0.9 * torch.tensor([1.0, 0.0]) + 0.1 * F.normalize(torch.tensor([2.0, 1.0]), dim=0)
    assert torch.allclose(book.embed[0], moved)
    assert any(torch.allclose(book.embed[2], F.normalize(row, dim=0)) for row in z.flatten(1))
    pull = F.mse_loss(z, torch.eye(2).view(2, 2, 1, 1))
    assert quantized.loss.item() == pytest.approx(pull.item())


def test_memcodes_train_their_codes_and_decode_what_they_encode():
    codes, z = Memcodes(2, 8, 3).train(), torch.randn(4, 6, 1, 1, requires_grad=True)
    codes(z).latents.sum().backward()
    assert codes.codes.grad.abs().sum() > 0
    assert z.grad is not None
    quantized = codes.eval()(z)
    assert quantized.tokens.shape == (4, 2, 1, 1)
    assert torch.allclose(codes.lookup(quantized.tokens), quantized.latents)
