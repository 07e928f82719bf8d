"""Ordered tokens of adaptive length, lookup-free codes, losses by name."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tokenizers_vq.codec import ValueCodec
from tokenizers_vq.losses import LOSSES, Perceptual, reconstruction_loss
from tokenizers_vq.ordered import OrderedVQ, build_network
from tokenizers_vq.quality import reconstruction_quality
from tokenizers_vq.quantizers import LookupFree, code_statistics
from tokenizers_vq.tokenizer import Tokenizer, load_tokenizer
from tokenizers_vq.vqvae import VQVAE, VQConfig

torch.set_num_threads(1)
SMALL = {"channels": 1, "image_size": 16, "patch": 4, "width": 16, "heads": 2}


def _ordered(**changes) -> OrderedVQ:
    torch.manual_seed(0)
    return OrderedVQ(VQConfig(**(SMALL | {"registers": 6} | changes)))


def test_any_prefix_decodes_and_later_tokens_do_not_change_earlier_ones(tmp_path):
    tokenizer = Tokenizer("depth", _ordered(), ValueCodec(kind="depth"), "fp32")
    assert tokenizer.ordered
    values = list(np.random.default_rng(0).uniform(0.1, 1, (2, 16, 16)).astype(np.float32))
    tokens = tokenizer.encode_values(values)
    assert tokens.shape == (2, 6) == (2, tokenizer.num_tokens)
    decoded = [tokenizer.decode_output(tokens[:, :count]) for count in range(1, 7)]
    assert {output.shape for output in decoded} == {(2, 1, 16, 16)}
    changed = tokens.copy()
    changed[:, 3:] = 0
    assert torch.equal(tokenizer.decode_output(changed[:, :3]), decoded[2])
    assert not torch.equal(decoded[5], decoded[2])
    tokenizer.save(tmp_path / "t")
    again = load_tokenizer(tmp_path / "t", precision="fp32")
    assert torch.equal(again.decode_output(tokens[:, :4]), decoded[3])
    with pytest.raises(ValueError, match="7 tokens instead of 1 to 6"):
        tokenizer.decode_tokens(np.zeros((1, 7), int))


def test_training_drops_the_last_tokens_of_every_sample_at_random():
    net = _ordered().train()
    x = torch.rand(1, 1, 16, 16).expand(16, -1, -1, -1)
    torch.manual_seed(0)
    output, quantized = net(x)
    assert quantized.tokens.shape == (16, 6)
    assert len({tuple(row.tolist()) for row in output.flatten(1)}) > 2  # lengths differ
    output.square().mean().backward()
    assert net.queries.grad.abs().sum() > 0
    assert net.absent.grad.abs().sum() > 0
    full, _ = net.eval()(x[:1])
    assert torch.allclose(full, net.decode(net.encode(x[:1])), atol=1e-5)


def test_networks_without_registers_are_as_before():
    config = VQConfig(**SMALL)
    assert type(build_network(config)) is VQVAE
    assert "registers" not in config.to_dict()
    assert type(build_network(VQConfig(**SMALL, registers=2))) is OrderedVQ
    with pytest.raises(ValueError, match="registers=-1"):
        VQConfig(**SMALL, registers=-1)


def test_lookup_free_codes_are_signs_and_decode_to_what_was_quantised():
    torch.manual_seed(0)
    bottleneck, z = LookupFree(8, 16).train(), torch.randn(4, 50, 8, requires_grad=True)
    quantized = bottleneck(z)
    (quantized.latents.sum() + quantized.loss).backward()
    assert z.grad.abs().sum() > 0
    quantized = bottleneck.eval()(z)
    assert torch.allclose(bottleneck.lookup(quantized.tokens), quantized.latents, atol=1e-5)
    assert code_statistics(quantized.tokens, 16)["usage"] > 0.5
    net = build_network(VQConfig(**SMALL, quantizer="lfq", codebook_size=64)).eval()
    assert int(net.encode(torch.rand(1, 1, 16, 16)).max()) < 64
    with pytest.raises(ValueError, match="1000 codes are no power of two"):
        VQConfig(**SMALL, quantizer="lfq", codebook_size=1000)


def test_losses_by_name_replace_the_kind_s_own_where_they_fit():
    pred, target = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 2.0)
    assert reconstruction_loss("depth") is LOSSES["depth"]
    assert reconstruction_loss("depth", "mse")(pred, target) == 4
    assert reconstruction_loss("depth", "l1")(pred, target) == 2
    assert reconstruction_loss("vector", "cosine")(target, 3 * target) < 1e-6
    assert reconstruction_loss("mask", "bce")(pred, torch.ones_like(pred)) == pytest.approx(
        np.log(2))
    for kind, name in (("depth", "bce"), ("semseg", "mse"), ("rgb", "cross_entropy")):
        with pytest.raises(ValueError, match=f"'{name}' does not fit {kind}"):
            reconstruction_loss(kind, name)
    with pytest.raises(ValueError, match="choose one of mse"):
        reconstruction_loss("rgb", "huber")


def test_losses_of_hand_made_values():
    maps = torch.tensor([[[[0.5, 0.0], [0.0, 0.0]]]]), torch.zeros(1, 1, 2, 2)
    vectors = (torch.tensor([0.0, 0.0, 2.0]).view(1, 3, 1, 1),
               torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1))
    classes = torch.zeros(1, 4, 1, 2), torch.tensor([[[3, 255]]])
    expected = {
        "rgb": (maps, 0.125 + 2 * 0.0625),
        "depth": (maps, 5 * 0.49 / 4 + 0.5),
        "edge": (maps, 0.125 / 4 + 0.5),
        "normal": (vectors, 1 + 1),
        "feature": (vectors, 2 / 3 + 1),
        "vector": (vectors, 2 / 3 + 1),
        "semseg": (classes, np.log(4)),
        "mask": ((maps[1], maps[1]), np.log(2)),
    }
    assert expected.keys() == LOSSES.keys()
    for kind, (pair, value) in expected.items():
        assert LOSSES[kind](*pair) == pytest.approx(value, rel=1e-5), kind


class _Blocks(torch.nn.Module):
    """Stands in for a timm network: its two blocks see the picture and its edges."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward_intermediates(self, x, indices, intermediates_only):
        assert intermediates_only
        seen = [x * self.weight, x.diff(dim=-1) * self.weight]
        return [seen[i] for i in indices]


def test_perceptual_distance_is_zero_for_equal_pictures_and_trains_only_the_picture():
    perceptual = Perceptual(_Blocks(), blocks=(0, 1), distance="l1", size=8).train()
    picture = torch.rand(2, 3, 16, 16)
    pred = picture.clone().requires_grad_()
    assert perceptual(pred, picture) == 0
    perceptual(pred + 0.1 * torch.rand_like(pred), picture).backward()
    assert pred.grad.abs().sum() > 0
    assert perceptual.network.weight.grad is None
    assert not perceptual.network.training
    with pytest.raises(ValueError, match="'cosine' or 'l1'"):
        Perceptual(_Blocks(), distance="l2")


def test_new_kinds_have_a_metric():
    mask = np.array([[1, 0], [1, 1]], np.uint8)
    assert reconstruction_quality("mask", [mask], [np.ones((2, 2))]) == {"iou": 0.75}
    vector = np.array([1.0, 2.0], np.float32)
    assert reconstruction_quality("vector", [2 * vector], [vector]) == {
        "cosine": pytest.approx(1)}
    edge = np.zeros((2, 2), np.uint8)
    assert reconstruction_quality("edge", [edge], [edge + 255]) == {"psnr": pytest.approx(0)}


def test_smooth_l1_of_the_library_is_what_the_released_recipes_name():
    pred, target = torch.tensor([0.0, 3.0]), torch.tensor([0.5, 0.0])
    got = reconstruction_loss("feature", "smooth_l1")(pred, target)
    assert got == pytest.approx((0.5 * 0.25 + 2.5) / 2)
    assert got == F.smooth_l1_loss(pred, target, beta=1.0)
