"""VQ-ControlNet: files under the released names, Stable Diffusion from elsewhere, training.

All networks are tiny and random; the sizes of the real ones are checked without weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tokenizers_vq
from infra.store import Store
from tasks.tokenizer_config import TokenizerRecipe
from tasks.tokenizer_health import HealthCheck
from tasks.tokenizer_recipes import RELEASED, tokenizer_recipe
from tasks.tokenizer_task import reconstruction_task
from tasks.trainer import Trainer
from tokenizers_vq.released.codebooks import MovingCodebook
from tokenizers_vq.released.controlnet import (
    SteeredDenoiser,
    VQControlNet,
    control_widths,
    sample_multistep,
)
from tokenizers_vq.released.network import ReleasedShape, Sampling
from tokenizers_vq.released.stable import AutoencoderSizes, UNetSizes
from tokenizers_vq.released.vit import ViTEncoder
from tokenizers_vq.tokenizer import Tokenizer, from_files

torch.set_num_threads(1)
UNET = UNetSizes(widths=(32, 64), blocks=1, attends=(True, False), context=16)
VAE = AutoencoderSizes(widths=(32, 64), blocks=1)
LATENT, PICTURE, TOKENS = 8, 32, (2, 2)
CONFIG = {"norm_codes": True, "image_size_sd": PICTURE}
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def _net() -> VQControlNet:
    """Random weights throughout, so that a part that is not loaded shows; 2 x 2 tokens of 8 px."""
    torch.manual_seed(0)
    decoder, vae = SteeredDenoiser(UNET.build(), LATENT, (LATENT, 8, 16)), VAE.build()
    encoder = ViTEncoder(channels=3, patch=8, width=16, depth=1, heads=2, hidden=32, grid=TOKENS,
                         post_hidden=32)
    shape = ReleasedShape(vocab_size=32, channels=3, patch=8, grid=2, codebooks=1, num_classes=0)
    net = VQControlNet(shape, encoder=encoder, quantize=MovingCodebook(32, LATENT), latent=LATENT,
                       width=16, decoder=decoder, vae=vae, picture=PICTURE)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion as the hub holds it, the autoencoder under its former names."""
    from transformers import CLIPTextConfig, CLIPTextModel

    folder, state = tmp_path_factory.mktemp("sd"), _net().state_dict()
    for name, prefix in (("unet", "decoder.unet."), ("vae", "vae.")):
        tensors = {key.removeprefix(prefix): value for key, value in state.items()
                   if key.startswith(prefix)}
        (folder / name).mkdir()
        save_file({_former(key): value.contiguous() for key, value in tensors.items()},
                  folder / name / "diffusion_pytorch_model.safetensors")
    torch.manual_seed(1)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=20, hidden_size=UNET.context, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=18, eos_token_id=19,
        pad_token_id=19,
    ))
    text.save_pretrained(folder / "text_encoder")
    return folder


def _former(name: str) -> str:
    for new, old in OLD.items():
        if "mid_block.attentions.0." in name and "transformer_blocks" not in name:
            name = name.replace(f".{new}.", f".{old}.")
    return name


def _write(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file({name: value.contiguous() for name, value in tensors.items()},
              folder / "model.safetensors")
    return folder


def _load(folder: Path) -> Tokenizer:
    found = tokenizers_vq.load(folder, modality="rgb", head_width=8)
    found.net.sampling = Sampling(steps=3)
    return found


def test_a_released_file_with_stable_diffusion_inside_loads_and_decodes_to_pictures(tmp_path):
    net = _net()
    tensors = {**net.state_dict(), "decoder.text_encoder.text_model.unused": torch.zeros(2)}
    tokenizer = _load(_write(tmp_path / "rgb", tensors))
    assert isinstance(tokenizer.net, VQControlNet)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    tokens = tokenizer.encode_values(pictures)
    assert tokens.shape == (2, 4)
    made = tokenizer.decode_tokens(tokens)
    assert made[0].shape == (PICTURE, PICTURE, 3)
    assert made[0].dtype == np.uint8
    net.sampling = Sampling(steps=3)
    with torch.no_grad():
        expected = net.decode(torch.from_numpy(tokens.astype(np.int64)).unflatten(1, TOKENS))
    assert np.array_equal(np.stack(made), np.stack(tokenizer.codec.from_tensor(expected)))
    larger = tokenizer.encode_values(np.zeros((1, 32, 32, 3), np.uint8))
    assert larger.shape == (1, 16)
    assert tokenizer.decode_tokens(larger)[0].shape == (PICTURE, PICTURE, 3)
    again = from_files(tokenizer.files(), "fp32")
    again.net.sampling = Sampling(steps=3)
    assert np.array_equal(again.decode_tokens(tokens), made)


def test_stable_diffusion_is_taken_from_where_the_configuration_says_where_a_file_lacks_it(
    tmp_path, stable
):
    state = _net().state_dict()
    own = {name: value for name, value in state.items()
           if not name.startswith(("decoder.unet.", "vae.", "decoder.empty"))}
    found = _load(_write(tmp_path / "rgb", own, sd_path=str(stable))).net.state_dict()
    for name in state.keys() - {"decoder.empty_str_encoding"}:
        assert torch.equal(found[name], state[name]), name
    from transformers import CLIPTextModel

    text = CLIPTextModel.from_pretrained(stable / "text_encoder", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = text(torch.tensor([[18, *[19] * 76]])).last_hidden_state
    assert torch.allclose(found["decoder.empty_str_encoding"], expected, atol=1e-6)


@pytest.mark.parametrize("file", [
    "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
])
def test_an_incomplete_stable_diffusion_is_refused_and_what_it_lacks_is_named(
    tmp_path, stable, file
):
    import shutil

    shutil.copytree(stable, tmp_path / "sd")
    (tmp_path / "sd" / file).rename(tmp_path / "sd" / file.replace(".safetensors", ".bin"))
    own = {name: value for name, value in _net().state_dict().items()
           if not name.startswith(("decoder.unet.", "vae.", "decoder.empty"))}
    folder = _write(tmp_path / "rgb", own, sd_path=str(tmp_path / "sd"))
    with pytest.raises(FileNotFoundError, match=f"Stable Diffusion.*the folder has no {file}"):
        _load(folder)


def test_tensors_that_do_not_make_the_network_are_refused_by_name(tmp_path):
    state = _net().state_dict()
    del state["decoder.controlnet.controlnet_mid_block.weight"]
    with pytest.raises(ValueError, match=r"lacks decoder\.controlnet\.controlnet_mid_block"):
        _load(_write(tmp_path / "less", state))
    adapted = {**_net().state_dict(),
               "decoder.controlnet.controlnet_cond_embedding.adapter_model.x": torch.zeros(1)}
    with pytest.raises(ValueError, match="through an adapter: that is not supported"):
        _load(_write(tmp_path / "adapted", adapted))


def _count(net: torch.nn.Module) -> tuple[int, int]:
    return len(net.state_dict()), sum(value.numel() for value in net.state_dict().values())


def test_the_defaults_are_the_networks_of_stable_diffusion_and_their_published_names():
    with torch.device("meta"):
        unet, vae = UNetSizes().build(), AutoencoderSizes().build()
        control = SteeredDenoiser(unet, 32, control_widths(32)).controlnet
    assert _count(unet) == (686, 859_520_964)
    assert _count(vae) == (248, 83_653_863)
    # The published ControlNet has 361,279,120, 1,086,480 of which read a picture of 8 times the
    # side; the released one reads codes instead.
    reads = _count(control.controlnet_cond_embedding)[1]
    assert _count(control)[1] - reads == 361_279_120 - 1_086_480
    wanted = {
        "time_embedding.linear_1.weight": (1280, 320),
        "down_blocks.1.resnets.0.conv_shortcut.weight": (640, 320, 1, 1),
        "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.bias": (320,),
        "mid_block.attentions.0.proj_in.weight": (1280, 1280, 1, 1),
        "controlnet_down_blocks.11.weight": (1280, 1280, 1, 1),
        "controlnet_cond_embedding.blocks.5.weight": (256, 96, 3, 3),
    }
    state = control.state_dict()
    assert {name: tuple(state[name].shape) for name in wanted} == wanted
    assert tuple(unet.state_dict()["up_blocks.3.resnets.2.conv1.weight"].shape) == (320, 640, 3, 3)
    assert tuple(vae.state_dict()["encoder.mid_block.attentions.0.to_out.0.weight"].shape) == (
        512, 512)


def _waves(net: torch.nn.Module) -> torch.nn.Module:
    """Weights that depend on a tensor's name and place alone."""
    with torch.no_grad():
        for name, value in net.state_dict().items():
            places = torch.arange(value.numel(), dtype=torch.float64)
            phase = sum(map(ord, name)) % 97
            spread = 1.0 if value.dim() < 2 else 2.0 / math.sqrt(value[0].numel())
            value.copy_((torch.sin(places * 1.7 + phase) * spread).view_as(value))
    return net.eval()


def _input(*shape: int) -> torch.Tensor:
    return torch.cos(torch.arange(math.prod(shape), dtype=torch.float64) * 0.37).view(shape).float()


def test_denoiser_control_and_autoencoder_give_the_recorded_numbers():
    """Recorded with networks of diffusers 0.42.1 whose sizes were given by hand."""
    unet, vae = _waves(UNET.build()), _waves(VAE.build())
    control = _waves(SteeredDenoiser(UNET.build(), 8, (8, 8, 16)).controlnet)
    x, t, context = _input(2, 4, 8, 8), torch.tensor([3, 700]), _input(2, 5, 16)
    with torch.no_grad():
        heard, middle = control(x, t, context, _input(2, 8, 8, 8), return_dict=False)
        plain = unet(x, t, context).sample
        told = unet(
            x, t, context, down_block_additional_residuals=[0.1 * _input(*each.shape)
                                                            for each in heard],
            mid_block_additional_residual=0.1 * _input(2, 64, 4, 4),
        ).sample
        spread = vae.encode(_input(1, 3, 16, 16)).latent_dist
        picture = vae.decode(_input(1, 4, 8, 8)).sample
    found = {"plain": plain, "told": told, "mean": spread.mean, "deviation": spread.std,
             "picture": picture, "first": heard[0], "last": heard[-1], "middle": middle}
    for name, (total, corner) in RECORDED.items():
        assert float(found[name].abs().mean()) == pytest.approx(total, rel=1e-4), name
        assert float(found[name].flatten()[7]) == pytest.approx(corner, rel=1e-3, abs=1e-4), name


RECORDED = {
    "plain": (0.650968, 1.240790), "told": (0.651486, 1.372558), "mean": (1.498833, 0.538553),
    "deviation": (2.488891, 1.195944), "picture": (0.710760, -0.562877),
    "first": (5.927901, -8.040345), "last": (8.749503, 13.082260),
    "middle": (61.639526, 43.732231),
}  # fmt: skip
"""Mean magnitude and eighth number of each result."""


@pytest.mark.parametrize(("how", "expected"), [
    ({}, (0.654594, 0.150342)), ({"strength": 0.8}, (0.661546, 0.168862)),
    ({"silent": True}, (0.718754, 0.250698)), ({"hidden": True}, (0.654596, 0.150790)),
])
def test_the_denoiser_gives_the_numbers_of_the_released_code(how, expected):
    """Recorded with the released decoder around networks of diffusers, on the same weights."""
    decoder = _waves(SteeredDenoiser(UNET.build(), LATENT, (LATENT, 32, 96)))
    x, t, codes = _input(2, 4, 16, 16), torch.tensor([3, 700]), _input(2, LATENT, *TOKENS)
    if "hidden" in how:
        how = {"hidden": torch.tensor([[[True, False], [False, False]]] * 2)}
    with torch.no_grad():
        found = decoder(x, t, codes, **how)
    assert float(found.abs().mean()) == pytest.approx(expected[0], rel=1e-4)
    assert float(found.flatten()[7]) == pytest.approx(expected[1], rel=1e-3)


@pytest.mark.parametrize(("steps", "expected"), [
    (1, (0.998754, 0.528409, -0.404821)), (2, (3.381278, 1.646709, -1.856324)),
    (5, (9.314144, 3.539504, -4.078569)), (50, (6.357931, 4.511766, -4.455603)),
])
def test_latents_are_sampled_by_the_multistep_rule_of_stable_diffusion(steps, expected):
    """Recorded with the PNDM scheduler of diffusers 0.42.1."""
    asked = []

    def denoise(x, t):
        asked.append(int(t[0]))
        return torch.sin(3 * x + t.float().view(-1, 1, 1, 1) / 300)

    noise = torch.cos(torch.arange(16).float()).view(1, 1, 4, 4)
    found = sample_multistep(denoise, noise, steps=steps)
    assert found.flatten()[:3].tolist() == pytest.approx(expected, rel=1e-4)
    assert len(asked) == (steps + 1 if steps > 1 else 1)
    if steps == 5:
        assert asked == [801, 601, 601, 401, 201, 1]


def test_all_steps_can_be_visited_and_no_more():
    asked = []

    def denoise(x, t):
        asked.append(int(t[0]))
        return x

    found = sample_multistep(denoise, torch.ones(1, 1, 1, 1), steps=1000)
    assert (max(asked), min(asked)) == (999, 0)
    assert found.isfinite().all()
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=rf"steps={steps} must lie in 1\.\.1000"):
            sample_multistep(denoise, found, steps=steps)


SMALL = {
    "size": 16, "patch": 8, "width": 64, "encoder_depth": 1, "decoder_depth": 1, "codes": 32,
    "latent": 8, "batch_size": 2, "steps": 2, "warmup": 0, "eval_every": 0, "max_samples": 8,
}  # fmt: skip


def _train(store: Store, recipe: TokenizerRecipe, packed: np.ndarray) -> Tokenizer:
    task = reconstruction_task(store, "rgb", recipe, packed)
    net = Trainer(store, f"runs/{recipe.architecture}", task, recipe.training(1)).fit().model
    return Tokenizer("rgb", net, task.codec, "fp32")


def test_training_moves_the_controlnet_alone_and_what_is_stored_opens_like_a_released_file(
    tmp_path, stable
):
    store, rng = Store(str(tmp_path)), np.random.default_rng(0)
    plain = {**SMALL, "preset": "released", "architecture": "vit", "loss": "mse"}
    before = _train(store, tokenizer_recipe("rgb", **plain),
                    rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))
    before.save(tmp_path / "tokenizers" / "rgb@0")
    recipe = dataclasses.replace(
        RELEASED["rgb_controlnet"], **SMALL, picture=PICTURE, stable_diffusion=str(stable),
        encoder="tokenizers/rgb@0", lr=1e-2,
    )
    assert (recipe.crops.size, recipe.size) == (PICTURE, 16)
    pictures = rng.integers(0, 256, (8, PICTURE, PICTURE, 3), dtype=np.uint8)
    task = reconstruction_task(store, "rgb", recipe, pictures)
    first = task.build_model()
    moving = {name for name, value in first.named_parameters() if value.requires_grad}
    assert moving == {name for name, _ in first.named_parameters() if ".controlnet." in name}
    with torch.no_grad():  # before any training it says nothing: codes make no difference
        x, t = _input(2, 4, 16, 16), torch.tensor([3, 700])
        spoken = [first.denoise(x, t, codes) for codes in (_input(2, 8, 2, 2),
                                                          torch.zeros(2, 8, 2, 2))]
    assert torch.equal(*spoken)
    behind = _train(store, recipe, pictures)
    after, start = behind.net.state_dict(), first.state_dict()
    changed = {name for name in start if not torch.equal(start[name], after[name])}
    assert changed
    assert all(name.startswith("decoder.controlnet.") for name in changed)
    for key, value in load_file(stable / "unet/diffusion_pytorch_model.safetensors").items():
        assert torch.equal(after[f"decoder.unet.{key}"], value)
    small = rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    assert np.array_equal(behind.encode_values(small), before.encode_values(small))

    behind.save(tmp_path / "stored" / "rgb")
    again = from_files(behind.files(), "fp32")
    again.net.sampling = behind.net.sampling = Sampling(steps=2)
    tokens = behind.encode_values(small)
    assert np.array_equal(again.decode_tokens(tokens), behind.decode_tokens(tokens))
    check = HealthCheck("rgb", behind.codec, list(pictures[:2]), side=recipe.size)
    metrics = check(behind.net)
    assert check.counts.sum() == 2 * 4
    assert metrics["psnr"] > 0


def test_tokenizers_are_imported_without_diffusers():
    code = ("import sys, tokenizers_vq.tokenizer, tokenizers_vq.released.checkpoint, "
            "tokenizers_vq.released.design; assert 'diffusers' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_controlnet_without_codes_to_learn_from_is_refused(tmp_path):
    packed = np.zeros((2, PICTURE, PICTURE, 3), np.uint8)
    recipe = dataclasses.replace(RELEASED["rgb_controlnet"], **SMALL, picture=PICTURE)
    with pytest.raises(ValueError, match="behind the codes of a stored tokenizer: name it with"):
        reconstruction_task(Store(str(tmp_path)), "rgb", recipe, packed)
    with pytest.raises(ValueError, match="picture=0: the architecture 'controlnet' needs a side"):
        tokenizer_recipe("rgb", architecture="controlnet")
