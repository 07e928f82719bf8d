"""VQ-ControlNet: codes of a frozen encoder, decoded by Stable Diffusion under a ControlNet's lead.

Only the ControlNet learns. Pictures are made at Stable Diffusion's side whatever the number of
tokens: the codes are spread over its latents. Shapes: B batch, H, W pixels, C latent channels,
D code width, h, w grid of codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vq.diffusion import Diffusion
from tokenizers_vq.quantizers import Quantized
from tokenizers_vq.released.codebooks import MovingCodebook
from tokenizers_vq.released.network import ReleasedShape, ReleasedVQ
from tokenizers_vq.released.shapes import Shapes, require_equal
from tokenizers_vq.released.stable import (
    EMPTY,
    UNET,
    VAE,
    AutoencoderSizes,
    UNetSizes,
    autoencoder_sizes,
    read_stable,
    unet_sizes,
)
from tokenizers_vq.released.vit import ViTEncoder

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

STABLE = Diffusion(
    schedule="scaled_linear", prediction="epsilon", zero_terminal_snr=False, clamp=False,
    beta_start=0.00085, beta_end=0.012,
)  # fmt: skip
"""Noise of Stable Diffusion 1."""
PICTURE = 512
"""Side in pixels that Stable Diffusion 1 was trained on."""
TEXT_TOKENS = 77
_BATCH = 8  # pictures that the autoencoder decodes at once


def control_widths(latent: int) -> tuple[int, ...]:
    """Channels of the released convolutions that read codes of width `latent`."""
    return latent, 32, 96, 256


class SteeredDenoiser(nn.Module):
    """What `decoder.` of a released file holds: the UNet, its ControlNet, and the empty prompt.

    Args:
        unet: Stable Diffusion's; the ControlNet begins as a copy of its first half that says
            nothing.
        condition: D.
        widths: Of the convolutions that read the codes.
    """

    def __init__(
        self, unet: UNet2DConditionModel, condition: int, widths: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.unet = unet
        self.controlnet = _control(unet, condition, widths)
        context = unet.config.cross_attention_dim
        self.empty_str_encoding = nn.Parameter(torch.zeros(1, TEXT_TOKENS, context))

    def forward(
        self, xt: Tensor, t: Tensor, codes: Tensor, hidden: Tensor | None = None,
        strength: float = 1.0, silent: bool = False,
    ) -> Tensor:
        """Noise in latents.

        Args:
            xt: Noisy latents [B, C, H / 8, W / 8].
            t: Diffusion steps int64 [B].
            codes: Quantised latents [B, D, h, w].
            hidden: bool [B, h, w], True where they are not shown.
            strength: Factor of all that the ControlNet says.
            silent: Keeps it from the skip connections, but, as released, not from the middle.
        """
        if hidden is not None:
            codes = codes.masked_fill(hidden[:, None], 0.0)
        condition = F.interpolate(codes, size=xt.shape[2:], mode="nearest").to(xt.dtype)
        context = self.empty_str_encoding.expand(len(xt), -1, -1)
        skips, middle = self.controlnet(xt, t, context, condition, return_dict=False)
        factor = 0.0 if silent else strength
        return self.unet(
            xt, t, context, down_block_additional_residuals=[factor * each for each in skips],
            mid_block_additional_residual=strength * middle,
        ).sample


class VQControlNet(ReleasedVQ):
    """A VQ encoder with a `SteeredDenoiser`, all frozen but the ControlNet.

    Args:
        shape: Sizes its users ask about.
        encoder: Values to features of width `width`.
        quantize: The bottleneck.
        latent: D.
        width: Of the encoder's features.
        decoder: The denoiser.
        vae: Between pictures and Stable Diffusion's latents.
        picture: Side in pixels of what is decoded.

    Raises:
        ValueError: the side is no multiple of what Stable Diffusion takes.
    """

    decoding = (*ReleasedVQ.decoding, "vae.")
    frozen = True

    def __init__(
        self, shape: ReleasedShape, *, encoder: ViTEncoder, quantize: MovingCodebook, latent: int,
        width: int, decoder: SteeredDenoiser, vae: AutoencoderKL, picture: int = PICTURE,
    ) -> None:
        super().__init__(
            shape, encoder=encoder, quantize=quantize, latent=latent, features=(width, 0),
            decoder=decoder, diffusion=STABLE,
        )
        self._factor = 2 ** (len(vae.config.block_out_channels) - 1)
        step = self._factor * 2 ** (len(decoder.unet.config.block_out_channels) - 1)
        if picture % step:
            raise ValueError(f"a side of {picture} px: Stable Diffusion takes multiples of {step}")
        self.vae, self.picture, self.strength = vae, picture, 1.0
        self.requires_grad_(False)
        decoder.controlnet.requires_grad_(True)

    def forward(
        self, x: Tensor, noise: Tensor | None = None, t: Tensor | None = None,
        hidden: Tensor | None = None, clean: Tensor | None = None,
    ) -> tuple[Tensor, Quantized]:
        """As of every `ReleasedVQ`. The encoder sees pictures [B, 3, H, W] at its own side, the
        rest is in latents, which are not made anew where `clean` gives them."""
        if clean is None:
            clean = self.clean(x)
        return super().forward(_sized(x, self.config.grid * self.config.patch), noise, t, hidden,
                               clean)

    @torch.no_grad()
    def clean(self, x: Tensor) -> Tensor:
        """Latents [B, C, picture / 8, picture / 8] of pictures [B, 3, H, W], drawn as the
        autoencoder tells their spread."""
        drawn = self.vae.encode(_sized(x, self.picture)).latent_dist.sample()
        return self.vae.config.scaling_factor * drawn

    def unguided(self, xt: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        """What guidance leads away from: the ControlNet is silent."""
        return self._denoiser(xt, t, latents, strength=self.strength, silent=True)

    def denoise(
        self, xt: Tensor, t: Tensor, latents: Tensor, hidden: Tensor | None = None
    ) -> Tensor:
        """One call of the denoiser."""
        return self._denoiser(xt, t, latents, hidden, self.strength)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, h, w] to pictures float32 [B, 3, picture, picture] in [-1, 1]."""
        parts = (super().decode(tokens) / self.vae.config.scaling_factor).split(_BATCH)
        return torch.cat([self.vae.decode(part).sample.float().clamp(-1, 1) for part in parts])

    def walk(
        self, denoise: Callable[[Tensor, Tensor], Tensor], noise: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """From noise to latents, by the rule that Stable Diffusion is sampled with."""
        return sample_multistep(denoise, noise, steps=self.sampling.steps)

    def noise_shape(self, latents: Tensor) -> tuple[int, ...]:
        """That of one sample's latents."""
        side = self.picture // self._factor
        return 1, self.vae.config.latent_channels, side, side

    @property
    def _denoiser(self) -> SteeredDenoiser:
        return cast("SteeredDenoiser", self.decoder)


def sample_multistep(
    denoise: Callable[[Tensor, Tensor], Tensor], noise: Tensor, *, steps: int = 50
) -> Tensor:
    """Walks from noise to latents as Stable Diffusion does: by the linear multistep rule of PNDM
    (Liu et al., arXiv 2202.09778).

    Args:
        denoise: (x_t [B, ...], t int64 [B]) to the noise in x_t.
        noise: x_T [B, ...].
        steps: Steps visited; the second one is asked twice, to begin with.

    Raises:
        ValueError: more steps than there are, or none.
    """
    from diffusers import PNDMScheduler

    if not 1 <= steps <= STABLE.steps:
        raise ValueError(f"steps={steps} must lie in 1..{STABLE.steps}")
    scheduler = PNDMScheduler(
        num_train_timesteps=STABLE.steps, beta_schedule=STABLE.schedule,
        beta_start=STABLE.beta_start, beta_end=STABLE.beta_end, skip_prk_steps=True,
        steps_offset=int(steps < STABLE.steps),  # beyond the last step there is none
    )
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps.tolist():
        at = torch.full((len(x),), t, device=x.device)
        x = scheduler.step(denoise(x, at), t, x).prev_sample
    return x


def _control(
    unet: UNet2DConditionModel, condition: int, widths: tuple[int, ...]
) -> ControlNetModel:
    from diffusers import ControlNetModel

    control = ControlNetModel.from_unet(
        unet, conditioning_channels=condition, conditioning_embedding_out_channels=widths
    )
    # Pictures would be shrunk to the side of the latents; codes have it already.
    for layer in control.controlnet_cond_embedding.blocks:
        layer.stride = (1, 1)
    return control


def begun(
    shape: ReleasedShape, *, stable_diffusion: str, encoder: ViTEncoder, latent: int, **parts: Any
) -> VQControlNet:
    """A network to be trained: Stable Diffusion and a ControlNet that says nothing yet.

    Args:
        shape: As of `VQControlNet`, like `encoder`, `latent` and the other `parts`.
        stable_diffusion: Folder or hub id; empty: fresh weights of Stable Diffusion 1's sizes.

    Raises:
        FileNotFoundError: the source is not there or incomplete.
        ValueError: its tensors are not those of Stable Diffusion 1.
    """
    tensors = read_stable(stable_diffusion) if stable_diffusion else {}
    unet, vae = UNetSizes(), AutoencoderSizes()
    if tensors:
        shapes = Shapes(tensors)
        unet = unet_sizes(shapes.below("decoder.unet"))
        vae = autoencoder_sizes(shapes.below("vae"))
    decoder = SteeredDenoiser(unet.build(), latent, control_widths(latent))
    net = VQControlNet(
        shape, encoder=encoder, latent=latent, decoder=decoder, vae=vae.build(), **parts
    )
    if tensors:
        own = {name: value for name, value in net.state_dict().items()
               if name.startswith((UNET, VAE, EMPTY))}
        require_equal(own, tensors)
        net.load_state_dict(tensors, strict=False)
        decoder.controlnet.load_state_dict(decoder.unet.state_dict(), strict=False)
    return net


def _sized(x: Tensor, side: int) -> Tensor:
    """Pictures [B, 3, H, W] at another side in pixels."""
    if x.shape[2:] == (side, side):
        return x
    return F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)
