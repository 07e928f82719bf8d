"""Tokenizers: the cases `vqvae_*`, `memcodes_*`, `divae_*` and `diffusion_schedules`.

`serialisation` adds the case of texts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import tokenizers_vq
from tests.golden import serialisation  # noqa: F401
from tests.golden.registry import Case, Check, close, exact, family, relative
from tokenizers_vq.diffusion import Diffusion, timesteps
from tokenizers_vq.released.network import ReleasedVQ

VALUES, TRAJECTORY, SCHEDULE, LOSS, GRADIENT = 2e-5, 1e-4, 1e-6, 1e-5, 1e-4
_MODALITIES = {
    "vqvae_rgb": "rgb", "vqvae_semseg": "semseg", "vqvae_featuremap": "clip",
    "vqvae_mask_outconv": "sam_instance", "memcodes_global": "dinov2_global",
    "divae_unet": "rgb", "divae_uvit": "depth",
}


def _load(case: Case) -> ReleasedVQ:
    sizes = (case.info["architecture"] or {}).get("vit", {"dim": 64, "heads": 1})
    head_width = sizes["dim"] // sizes["heads"]
    modality = _MODALITIES.get(case.name)
    net = tokenizers_vq.load(case.checkpoint, modality=modality, head_width=head_width).net
    assert isinstance(net, ReleasedVQ)
    return net


@family("vqvae_*", "memcodes_*")
def reconstructions(case: Case) -> list[Check]:
    """Input to latent, tokens, codes and reconstruction; one training step where there is one."""
    net, expected = _load(case), case.tensors
    with torch.no_grad():
        checks = _forward(net, expected, "")
        if "alt.input" in expected:
            checks += _forward(net, expected, "alt.")
    if "train.embed_after" in expected:
        checks += _training_step(net, expected)
    return checks


def _forward(net: ReleasedVQ, expected: dict[str, Any], start: str) -> list[Check]:
    latent = net.latents(expected[f"{start}input"])
    tokens = net.quantize(latent).tokens
    got = {"latent": latent, "quantized": net.quantize.lookup(tokens)}
    if not start and "encoder_out" in expected:
        values = expected["input"]
        values = net.cls_emb(values).movedim(-1, 1) if net.config.num_classes else values
        got["encoder_out"] = net.encoder(values)
    if net.diffusion is None:
        got["decoded"] = net.decode(tokens)
    checks = [exact(f"{start}tokens", tokens, expected[f"{start}tokens"])]
    return checks + [
        close(start + name, value, expected[start + name], VALUES)
        for name, value in got.items() if start + name in expected
    ]


def _training_step(net: ReleasedVQ, expected: dict[str, Any]) -> list[Check]:
    net.train()
    net.quantize.dead_below = 0.0
    target = expected["input"]
    output, quantized = net(target)
    loss = F.cross_entropy(output, target) if net.config.num_classes else F.mse_loss(
        output, target)
    (loss + quantized.loss).backward()
    codes = net.quantize._codebook
    return [
        close("train.reconstruction_loss", loss, expected["train.reconstruction_loss"], LOSS),
        close("train.commitment_loss", quantized.loss, expected["train.commitment_loss"], LOSS),
        close("train.embed_after", codes.embed, expected["train.embed_after"], VALUES),
        close("train.cluster_size_after", codes.cluster_size,
              expected["train.cluster_size_after"], VALUES),
        *(relative(name, net.get_parameter(name.removeprefix("train.grad.")).grad, value, GRADIENT)
          for name, value in expected.items() if name.startswith("train.grad.")),
    ]


@family("divae_*")
@torch.no_grad()
def diffusion_decoders(case: Case) -> list[Check]:
    """Encoding, single denoising calls, and a deterministic trajectory."""
    net, expected = _load(case), case.tensors
    latents = expected["quantized"]
    at = expected["denoise.sample"], expected["denoise.timestep"], latents
    checks = _forward(net, expected, "")
    checks.append(close("denoise.out", net.denoise(*at), expected["denoise.out"], VALUES))
    hidden = net.denoise(*at, expected["denoise.cond_mask"])
    checks.append(
        close("denoise.out_masked_cond", hidden, expected["denoise.out_masked_cond"], VALUES))
    assert net.diffusion is not None
    x, steps = expected["ddim.initial_noise"], case.info["ddim"]["steps"]
    visited = timesteps(net.diffusion.steps, steps, case.info["ddim"]["spacing"])
    checks.append(exact("ddim.timesteps", visited, case.info["ddim"]["timesteps"]))
    for i, t in enumerate(visited):
        output = net.denoise(x, torch.full((len(x),), t), latents)
        x0, x = net.diffusion.step(output, x, t, t - net.diffusion.steps // steps)
        got = {"model_output": output, "pred_x0": x0, "sample": x}
        checks += [close(f"ddim.step{i}.{name}", value, expected[f"ddim.step{i}.{name}"],
                         TRAJECTORY) for name, value in got.items()]
    whole = net.diffusion.sample(
        lambda xt, t: net.denoise(xt, t, latents), expected["ddim.initial_noise"], steps=steps)
    return [*checks, close("ddim.final", whole, expected["ddim.final"], TRAJECTORY)]


@family("diffusion_schedules")
def diffusion_schedules(case: Case) -> list[Check]:
    """Betas, cumulative alphas, visited steps, noising and velocity."""
    expected, checks = case.tensors, []
    for name, value in expected.items():
        *parts, what = name.split(".")
        if what in ("betas", "alphas_cumprod"):
            zero = parts[-1] == "zero_snr"
            diffusion = _schedule(".".join(parts[:-1] if zero else parts), zero)
            got = diffusion.betas() if what == "betas" else diffusion.alphas()
            checks.append(close(name, got, value, SCHEDULE))
        elif what in ("noisy", "velocity"):
            diffusion = _schedule(".".join(parts[1:]), zero=True)
            got = getattr(diffusion, what)(
                expected["forward.x0"], expected["forward.noise"], expected["forward.t"])
            checks.append(close(name, got, value, VALUES))
    for name, visited in case.info["ddim_timesteps"].items():
        spacing, steps = name.split(":")
        got = timesteps(case.info["num_train_timesteps"], int(steps), spacing)
        checks.append(exact(name, got, visited))
    return checks


def _schedule(name: str, zero: bool) -> Diffusion:
    name = name.replace("shifted_cosine_", "shifted_cosine:")
    return Diffusion(schedule=name, zero_terminal_snr=zero)
