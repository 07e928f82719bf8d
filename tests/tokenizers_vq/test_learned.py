"""Learned tokenizers: shapes, value contracts, files, code statistics."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tokenizers_vq.codec import ValueCodec, feature_statistics, pack_value
from tokenizers_vq.losses import LOSSES, perceptual_network
from tokenizers_vq.quality import picture_quality, reconstruction_quality
from tokenizers_vq.quantizers import Codebook, FiniteScalar, Whitening, code_statistics
from tokenizers_vq.tokenizer import Tokenizer, fingerprint, from_files, load_tokenizer
from tokenizers_vq.vqvae import VQVAE, VQConfig, attention, sincos_positions

torch.set_num_threads(1)
RNG = np.random.default_rng(0)
SIZE = 32


def values(kind: str, count: int = 3):
    if kind == "rgb":
        return [RNG.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for _ in range(count)]
    if kind == "depth":
        return [RNG.uniform(0.05, 1, (SIZE, SIZE)).astype(np.float32) for _ in range(count)]
    if kind == "semseg":
        return [RNG.integers(0, 5, (SIZE, SIZE), dtype=np.uint8) for _ in range(count)]
    if kind == "feature":
        return [RNG.normal(3, 2, (4, 4, 6)).astype(np.float16) for _ in range(count)]
    normal = RNG.normal(size=(count, SIZE, SIZE, 3)).astype(np.float32)
    return list(normal / np.linalg.norm(normal, axis=-1, keepdims=True))


def codec(kind: str) -> ValueCodec:
    if kind != "feature":
        return ValueCodec(kind=kind)
    mean, std = feature_statistics(values("feature"))
    return ValueCodec(kind=kind, mean=mean, std=std)


def config(kind: str, **changes) -> VQConfig:
    small = {"image_size": SIZE, "patch": 8, "width": 32, "heads": 2}
    if kind == "feature":
        small |= {"image_size": 4, "patch": 1}
    channels = {"rgb": 3, "depth": 1, "normal": 3, "semseg": 4, "feature": 6}[kind]
    classes = 5 if kind == "semseg" else 0
    return VQConfig(channels=channels, num_classes=classes, **(small | changes))


KINDS = ("rgb", "depth", "normal", "semseg", "feature")


def test_tokens_are_decoded_in_batches_that_fit_into_memory(monkeypatch):
    net = VQVAE(config("depth"))
    tokenizer = Tokenizer("depth", net, codec("depth"), "fp32")
    tokens = torch.from_numpy(tokenizer.encode_values(values("depth", 5)).astype(np.int64))
    whole, decode, sizes = tokenizer.decode_tokens(tokens), net.decode, []

    def fits(part: torch.Tensor) -> torch.Tensor:
        if len(part) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(part))
        return decode(part)

    monkeypatch.setattr(net, "decode", fits)
    for one, other in zip(tokenizer.decode_tokens(tokens), whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_decoded_values_have_the_contract_s_types(kind):
    tokenizer = Tokenizer("any", VQVAE(config(kind)), codec(kind), "fp32")
    given = values(kind)
    tokens = tokenizer.encode_values(given)
    assert tokens.dtype == np.uint16
    assert tokens.shape == (3, tokenizer.num_tokens) == (3, 16)
    assert tokens.max() < tokenizer.vocab_size == 1000
    decoded = tokenizer.decode_tokens(tokens)
    assert decoded[0].shape == given[0].shape
    if kind in ("rgb", "semseg"):
        assert decoded[0].dtype == np.uint8
    if kind == "normal":
        assert np.allclose(np.linalg.norm(decoded[0], axis=-1), 1, atol=1e-3)
    if kind == "depth":
        assert (decoded[0] > 0).all()
        assert (decoded[0] <= 1).all()


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "semseg"])
def test_the_value_contract_inverts_itself(kind):
    contract, given = codec(kind), values(kind)
    packed = np.stack([contract.pack(value) for value in given])
    for ours, theirs in zip(contract.from_tensor(contract.to_tensor(packed)), given, strict=True):
        assert np.allclose(ours.astype(np.float32), theirs.astype(np.float32), atol=0.01, rtol=0.01)


def test_edges_masks_and_vectors_come_back_in_the_types_that_went_in():
    given = {
        "edge": np.array([[0, 255], [64, 1]], np.uint8),
        "mask": np.array([[0, 1], [1, 0]], np.uint8),
        "vector": np.array([1.0, -2.0], np.float32),
    }
    for kind, value in given.items():
        scale = {"mean": (0.5, 1.0), "std": (2.0, 4.0)} if kind == "vector" else {}
        contract = ValueCodec(kind=kind, **scale)
        tensor = contract.to_tensor(contract.pack(value)[None])
        logits = 8 * tensor - 4 if kind == "mask" else tensor
        (back,) = contract.from_tensor(logits)
        assert back.dtype == value.dtype
        assert back.tolist() == value.tolist()
        assert tensor.shape[:2] == (1, 2 if kind == "vector" else 1)


def test_depth_without_a_scale_decodes_to_its_order_stretched_over_each_map():
    contract = ValueCodec(kind="depth", depth_mode="standardise")
    maps = torch.tensor([[[[-1.0, 3.0]]], [[[5.0, 5.0]]]])
    assert [each.tolist() for each in contract.from_tensor(maps)] == [[[0, 1]], [[0, 0]]]


def test_class_ids_come_back_from_their_logits_and_255_is_ignored():
    ids = torch.tensor([[[0, 2], [255, 1]]], dtype=torch.uint8)
    logits = 20.0 * F.one_hot(ids.long().clamp(max=2), 3).permute(0, 3, 1, 2)
    assert LOSSES["semseg"](logits, ids) < 1e-6
    assert codec("semseg").from_tensor(logits)[0].tolist() == [[0, 2], [2, 1]]


def test_standardised_depth_drops_the_tails_before_its_statistics():
    depth = np.linspace(0.2, 0.8, 100, dtype=np.float32).reshape(1, 10, 10)
    outlier = depth.copy()
    outlier[0, -1, -1] = 1.0
    contract = ValueCodec(kind="depth", depth_mode="standardise")
    plain, spoilt = contract.to_tensor(depth), contract.to_tensor(outlier)
    assert torch.allclose(plain[0, 0, :9], spoilt[0, 0, :9])
    assert abs(plain.mean()) < 0.05


def test_standardised_depth_may_be_in_any_unit():
    contract = ValueCodec(kind="depth", depth_mode="standardise")
    contract.check(np.full((4, 4), 350.0))
    ValueCodec(kind="depth").check(np.full((4, 4), 1 + 1e-6))  # as resizing leaves it


@pytest.mark.parametrize(("kind", "given", "sentence"), [
    ("depth", [np.zeros((SIZE, SIZE), np.uint8)], r"any takes floats \[H, W\], not uint8"),
    ("depth", [np.zeros((2, SIZE, SIZE))], r"floats \[H, W\], not float64 \[2, 32, 32\]"),
    ("depth", [np.full((SIZE, SIZE), np.nan)], "any takes finite numbers, but some are none"),
    ("depth", [np.full((SIZE, SIZE), 3.5)], r"takes numbers in 0\.\.1, not in 3\.5\.\.3\.5"),
    ("feature", [np.full((4, 4, 6), 1e5)], r"numbers in -65504\.\.65504, not in 100000"),
    ("normal", [np.full((SIZE, SIZE, 3), 128.0)], r"numbers in -1\.\.1, not in 128\.\.128"),
    ("depth", [np.zeros((SIZE, SIZE)), np.zeros((16, 16))], r"not of \[16, 16\] and \[32, 32\]"),
    ("depth", [np.zeros((33, 33))], r"any: \[33, 33\] does not divide into patches of 8"),
    ("normal", [np.zeros((3, SIZE, SIZE))], r"floats \[H, W, 3\], not float64 \[3, 32, 32\]"),
    ("rgb", [np.zeros((SIZE, SIZE), np.uint8)], r"values \[H, W, 3\], not uint8 \[32, 32\]"),
    ("feature", [np.zeros((4, 4, 5))], r"floats \[H, W, 6\], not float64 \[4, 4, 5\]"),
])
def test_values_that_are_none_of_the_modality_are_refused_by_shape_and_type(kind, given, sentence):
    tokenizer = Tokenizer("any", VQVAE(config(kind)), codec(kind), "fp32")
    with pytest.raises(ValueError, match=sentence):
        tokenizer.encode_values(given)


@pytest.mark.parametrize("value", [
    np.zeros((4, 4, 3), np.float32), np.full((4, 4), -1), np.full((4, 4), 256),
])
def test_bytes_are_not_made_of_other_numbers(value):
    with pytest.raises(ValueError, match=r"whole numbers in 0..255, not \w+ in"):
        pack_value("rgb" if value.ndim == 3 else "semseg", value)
    whole = np.full((4, 4), 255)
    assert pack_value("semseg", whole).dtype == np.uint8
    assert (pack_value("semseg", whole) == whole).all()


@pytest.mark.parametrize("quantizer", ["fsq", "vq"])
def test_decoding_tokens_equals_the_forward_pass(quantizer):
    net = VQVAE(config("depth", quantizer=quantizer, codebook_size=64)).eval()
    x = torch.rand(2, 1, SIZE, SIZE)
    with torch.no_grad():
        output, quantized = net(x)
        tokens = net.encode(x)
        assert tokens.shape == (2, 4, 4)
        assert torch.equal(tokens.flatten(1), quantized.tokens)
        assert torch.allclose(net.decode(tokens), output, atol=1e-4)


@pytest.mark.parametrize("quantizer", ["fsq", "vq"])
def test_gradients_reach_the_stem_through_the_bottleneck(quantizer):
    net = VQVAE(config("rgb", quantizer=quantizer, codebook_size=64)).train()
    output, quantized = net(torch.rand(4, 3, SIZE, SIZE))
    (output.square().mean() + quantized.loss).backward()
    assert net.stem.proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_codes_in_use_come_to_rest_and_dead_ones_are_replaced():
    torch.manual_seed(0)
    book = Codebook(16, 256, 8).train()

    def kept() -> torch.Tensor:
        """Cosine of each code with what a further batch makes of it, two latents a code."""
        before = book.vq.codebook.clone()
        book(torch.randn(1, 512, 16))
        return (before * book.vq.codebook).sum(-1)

    steps = torch.stack([kept() for _ in range(20)])
    assert (steps[-5:] < 0.9).float().mean() < 0.02
    book.vq._codebook.cluster_size[0, :64] = 0.0
    assert (kept()[:64] < 0.9).float().mean() > 0.8


def test_other_sizes_use_interpolated_positions():
    net = VQVAE(config("depth")).eval()
    assert net.encode(torch.rand(1, 1, 64, 48)).shape == (1, 8, 6)
    base, double = sincos_positions(32, 4, 4, 4), sincos_positions(32, 8, 8, 4)
    middle = double.view(4, 2, 4, 2, 32).mean((1, 3)).view(16, 32)
    assert (middle - base).abs().max() < 0.05


def test_written_out_attention_equals_the_kernel():
    q, k, v = torch.randn(3, 2, 2, 9, 8)
    expected = F.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(attention(q, k, v), expected, atol=1e-5)


def test_whitened_latents_are_uncorrelated_and_use_every_level():
    whiten = Whitening(3).train()
    mixed = torch.randn(4, 500, 3) @ torch.tensor([[3.0, 1, 0], [0, 0.1, 0], [1, 1, 5]]) + 7
    out = whiten(mixed).flatten(0, 1)
    assert torch.allclose(out.T @ out / len(out), torch.eye(3), atol=0.02)
    whiten.fit(mixed.flatten(0, 1))
    assert torch.allclose(whiten.eval()(mixed).flatten(0, 1), out, atol=1e-3)
    quantizer = FiniteScalar(3, (5, 5, 5)).train()
    quantizer.down = torch.nn.Identity()
    tokens = quantizer(mixed).tokens
    assert code_statistics(tokens, 125)["usage"] > 0.9


def test_statistics_are_measured_in_the_precision_in_which_latents_are_whitened():
    net, seen = VQVAE(config("depth")).eval(), []
    net.quantizer.whiten.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    x = torch.randn(1, 1, SIZE, SIZE)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        net(x)
        net.calibrate([x])
    rows = seen[0].double()
    assert torch.allclose(net.quantizer.whiten.mean.double(), rows.mean(0), atol=1e-6)
    assert torch.allclose(net.quantizer.whiten.cov.double(), rows.T.cov(correction=0), atol=1e-6)


def test_tokens_of_stored_tokenizers_never_change():
    """Published sets hold these numbers: another squashing or order of levels would spoil them."""
    quantizer = FiniteScalar(4, (8, 5, 5, 5)).eval()
    with torch.no_grad():
        quantizer.down.weight.copy_(torch.eye(4))
        quantizer.down.bias.zero_()
    x = torch.linspace(-1.95, 2.05, 7)
    z = torch.stack([x, x.flip(0), x.roll(2), -x.roll(3)], 1)[None]
    levels = (2 * torch.sigmoid(1.6 * z[0] / 1.0001**0.5)) / 2 * torch.tensor([7, 4, 4, 4])
    places = torch.tensor([1, 8, 8 * 5, 8 * 5 * 5])
    assert quantizer(z).tokens[0].tolist() == (levels.round() * places).sum(1).tolist()


def test_codes_are_jittered_in_training_alone_and_as_often_as_asked():
    quantizer, z = FiniteScalar(3, (9, 9, 9), jitter=0.25), torch.randn(4, 4000, 3)
    for module in (quantizer.up, quantizer.down):
        torch.nn.init.eye_(module.weight)
        torch.nn.init.zeros_(module.bias)
    quantizer.whiten.fit(z.flatten(0, 1))
    still = quantizer.eval()(z)
    assert torch.equal(still.latents, quantizer.lookup(still.tokens))
    moving = quantizer.train()(z)
    steps = ((moving.latents - quantizer.lookup(moving.tokens)) / quantizer.step).detach()
    up, down = ((steps.round() == sign).float().mean() for sign in (1, -1))
    # A step beyond the outer levels is not taken, so each share is less than 0.125.
    assert 0.09 < up < 0.126
    assert 0.09 < down < 0.126


def test_jitter_moves_codes_by_one_level_at_most_and_never_outside():
    quantizer = FiniteScalar(4, (8, 5, 5, 5), jitter=1.0).train()
    codes = torch.tensor([[-1.0, 0.0, 1.0, 0.5]]).expand(50, 4)
    moved = quantizer._jittered(codes)
    assert moved.abs().max() <= 1
    assert ((moved - codes).abs() <= quantizer.step + 1e-6).all()
    assert (moved != codes).any()


def test_saved_files_load_to_the_same_tokens_and_fingerprint(tmp_path):
    tokenizer = Tokenizer("depth", VQVAE(config("depth")), codec("depth"), "fp32")
    print_of_files = tokenizer.save(tmp_path / "t")
    again = load_tokenizer(tmp_path / "t", precision="fp32")
    given = values("depth")
    assert (again.encode_values(given) == tokenizer.encode_values(given)).all()
    assert fingerprint(again.files()) == print_of_files
    assert again.codec == tokenizer.codec


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda c: c["network"].update(encoder_depth=10**6), "tensors for more blocks"),
    (lambda c: c["network"].update(width=1 << 20), "weights do not fit the config"),
    (lambda c: c["network"].update(width="64"), "width is '64'"),
    (lambda c: c["network"].update(novel=1), "network of depth"),
    (lambda c: c["network"].update(patch=0), "patch=0 must be at least 1"),
    (lambda c: c.pop("codec"), "files of a tokenizer are damaged"),
    (lambda c: c.update(codec=3), "files of a tokenizer are damaged"),
    (lambda c: c.update(format=99), "tokenizer format 99"),
    (lambda c: c.update(format=2), "the network of a released tokenizer is not told"),
    (lambda c: c.update(format=2, network={"published": {}, "head_width": 0}), "head_width is 0"),
])
def test_tokenizers_that_do_not_fit_their_weights_are_refused_and_never_built(change, sentence):
    files = Tokenizer("depth", VQVAE(config("depth")), codec("depth"), "fp32").files()
    described = json.loads(files["config.json"])
    change(described)
    with pytest.raises(ValueError, match=sentence):
        from_files({**files, "config.json": json.dumps(described).encode()})


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_files_of_a_tokenizer_are_refused(name):
    files = Tokenizer("depth", VQVAE(config("depth")), codec("depth"), "fp32").files()
    for data in (b"", b"[" * 100_000, files[name][:-5]):
        with pytest.raises(ValueError, match="files of a tokenizer are damaged"):
            from_files({**files, name: data})


def test_wrong_tokens_are_refused_with_the_valid_range():
    tokenizer = Tokenizer("depth", VQVAE(config("depth")), codec("depth"), "fp32")
    with pytest.raises(ValueError, match=r"0\.\.999"):
        tokenizer.decode_tokens(np.full((1, 16), 1000, np.uint16))
    with pytest.raises(ValueError, match="square"):
        tokenizer.decode_tokens(np.zeros((1, 15), np.uint16))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"quantizer": "rvq"}, "fsq"), ({"patch": 7}, "multiple"), ({"width": 33}, "width")],
)
def test_networks_that_cannot_be_built_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config("rgb", **change)


def test_code_statistics_of_hand_made_counts():
    stats = code_statistics(torch.tensor([[0, 0, 1, 1]]), 4)
    assert stats == {"usage": 0.5, "perplexity": pytest.approx(2.0)}


def test_quality_of_hand_made_values():
    two = np.full((2, 2), 0.5, np.float32)
    depth = reconstruction_quality("depth", [two * 1.1], [two])
    assert depth == {"abs_rel": pytest.approx(0.1, abs=1e-5), "delta1": 1.0}
    up, side = np.zeros((1, 1, 3), np.float32), np.zeros((1, 1, 3), np.float32)
    up[..., 2], side[..., 0] = 1, 1
    assert reconstruction_quality("normal", [up], [side]) == {"mean_angle": pytest.approx(90)}
    pred, true = np.array([[0, 1]], np.uint8), np.array([[0, 255]], np.uint8)
    assert reconstruction_quality("semseg", [pred], [true]) == {"miou": 1.0}
    white = np.full((2, 2, 3), 255, np.uint8)
    assert reconstruction_quality("rgb", [white * 0], [white]) == {"psnr": pytest.approx(0)}


def test_missing_codes_cost_frequent_ones_hardly_and_the_loss_moves_latents_apart():
    quantizer = FiniteScalar(2, (5, 5), spread=0.5).train()
    steps = torch.linspace(-1, 1, 5)
    even = torch.cartesian_prod(steps, steps).repeat(4, 1)
    assert quantizer._missing(even) < 0.05
    alike = torch.zeros(100, 2, requires_grad=True)
    cost = quantizer._missing(alike)
    assert cost > 0.7
    uneven, half = torch.cat([alike, even]), torch.cat([even[even[:, 0] < 0.3]] * 2)
    assert quantizer._missing(uneven) < 0.5 * quantizer._missing(half) < 0.5 * cost
    (slope,) = torch.autograd.grad(quantizer._missing(alike + 0.1 * even), alike)
    assert slope.abs().sum() > 0
    assert quantizer(torch.randn(2, 8, 2)).loss > 0
    assert quantizer.eval()(torch.randn(2, 8, 2)).loss == 0
    assert "spread" not in config("rgb").to_dict()
    assert config("rgb", spread=0.1).to_dict()["spread"] == 0.1


def test_fewer_latents_than_tell_which_codes_are_missing_look_at_some_dimensions():
    quantizer = FiniteScalar(3, (8, 5, 5), spread=0.5).train()
    torch.manual_seed(0)
    seen = {tuple(quantizer._told_apart(torch.zeros(100, 3))[1]) for _ in range(40)}
    assert seen == {(2 / 7, 0.5), (0.5, 0.5)}
    assert len(quantizer._told_apart(torch.zeros(400, 3))[1]) == 3
    assert len(quantizer._told_apart(torch.zeros(1, 3))[1]) == 1


def test_equal_pictures_are_alike_in_every_figure():
    class Mean(torch.nn.Linear):
        def forward(self, pred, target):
            return (pred - target).abs().mean()

    given = [RNG.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for _ in range(40)]
    same = picture_quality(given, given, Mean(1, 1))
    assert same["ssim"] == pytest.approx(1)
    assert same["perceptual"] == 0
    other = picture_quality(given[::-1], given, Mean(1, 1))
    assert other["ssim"] < 0.5
    assert other["perceptual"] > 0.1
    edges = [picture[:, :, 0] for picture in given]
    assert picture_quality(edges, edges)["ssim"] == pytest.approx(1)


def test_lpips_has_three_networks():
    with pytest.raises(ValueError, match="lpips:alex, lpips:vgg or lpips:squeeze"):
        perceptual_network("lpips:resnet")
