"""Noise schedules and samplers of diffusion decoders.

After DDPM (Ho et al., arXiv 2006.11239) and DDIM (Song et al., arXiv 2010.02502).
Step t in 0..T-1 mixes x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, where a_t ("alpha bar") falls
from nearly 1 to 0 with zero terminal signal-to-noise ratio (Lin et al., arXiv 2305.08891).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Prediction = Literal["sample", "epsilon", "v_prediction", "v_prediction-epsilon_loss"]
Spacing = Literal["trailing", "linspace", "leading"]
STANDARD = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
"""Schedules of `diffusers`."""
SHIFTED = "shifted_cosine:"
_MAX_LOG_SNR = 15.0


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """A noise schedule and what its network predicts."""

    schedule: str = "linear"
    """`linear`, `scaled_linear`, `squaredcos_cap_v2`, `sigmoid`, or `shifted_cosine:{s}`; s above
    1 is noisier."""
    steps: int = 1000
    """T, steps the network was trained on."""
    zero_terminal_snr: bool = True
    """The last step is pure noise. `shifted_cosine` always ends so."""
    prediction: Prediction = "sample"
    """What the network's output means."""
    clamp: bool = True
    """Clips predicted values to [-1, 1] while sampling."""
    beta_start: float = 1e-4
    """First noise variance of the schedules that have one."""
    beta_end: float = 0.02
    """Last noise variance of the schedules that have one."""

    def __post_init__(self) -> None:
        if self.schedule not in STANDARD and not self.schedule.startswith(SHIFTED):
            raise ValueError(
                f"schedule={self.schedule!r}: choose one of {', '.join(STANDARD)}, {SHIFTED}<s>"
            )
        if self.prediction not in get_args(Prediction):
            raise ValueError(
                f"prediction={self.prediction!r}: choose one of {', '.join(get_args(Prediction))}"
            )

    def alphas(self) -> Tensor:
        """a_t of all steps, float32 [T]."""
        if self.schedule.startswith(SHIFTED):
            return _shifted_cosine(self.steps, float(self.schedule.removeprefix(SHIFTED)))
        from diffusers import DDPMScheduler

        betas = DDPMScheduler(
            num_train_timesteps=self.steps, beta_schedule=self.schedule,
            beta_start=self.beta_start, beta_end=self.beta_end,
        ).betas
        alphas = torch.cumprod(1 - betas, 0)
        return _without_signal(alphas) if self.zero_terminal_snr else alphas

    def betas(self) -> Tensor:
        """Noise variance added by each step, float32 [T]."""
        alphas = self.alphas()
        return 1 - torch.cat([alphas[:1], alphas[1:] / alphas[:-1]])

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of x_0 [B, ...] at steps t [B]."""
        signal, sigma = self._mix(t, x0)
        return signal * x0 + sigma * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """sqrt(a_t) noise - sqrt(1 - a_t) x_0, what `v_prediction` means."""
        signal, sigma = self._mix(t, x0)
        return signal * noise - sigma * x0

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is trained to give out."""
        if self.prediction == "sample":
            return x0
        return noise if self.prediction == "epsilon" else self.velocity(x0, noise, t)

    def compared(
        self, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What a loss compares: the output, or the noise it implies, and what it should be."""
        if self.prediction == "v_prediction-epsilon_loss":
            return self.split(output, self.noisy(x0, noise, t), t)[1], noise
        return output, self.target(x0, noise, t)

    def split(self, output: Tensor, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_0, noise) that a network's output implies for x_t."""
        signal, sigma = self._mix(t, xt)
        if self.prediction == "sample":
            return output, (xt - signal * output) / sigma
        if self.prediction == "epsilon":
            return (xt - sigma * output) / signal.clamp(min=1e-8), output
        return signal * xt - sigma * output, signal * output + sigma * xt

    def _mix(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (like.dim() - 1))
        a = self.alphas().to(like.device)[t].view(shape)
        return a.sqrt(), (1 - a).sqrt()

    def sample(
        self, denoise: Callable[[Tensor, Tensor], Tensor], noise: Tensor, *, steps: int = 50,
        spacing: Spacing = "trailing", eta: float = 0.0, generator: torch.Generator | None = None,
    ) -> Tensor:
        """Walks from noise to values.

        Args:
            denoise: (x_t [B, ...], t int64 [B]) to the network's output.
            noise: x_T [B, ...].
            steps: Calls of the network, one more where they do not divide T.
            spacing: Which steps are visited.
            eta: 0 is deterministic DDIM, 1 adds as much noise as DDPM.
            generator: Source of that noise.
        """
        x = noise
        visited = timesteps(self.steps, steps, spacing)
        for t in visited:
            at = torch.full((len(x),), t, device=x.device)
            _, x = self.step(denoise(x, at), x, t, t - self.steps // steps, eta, generator)
        return x

    def step(
        self, output: Tensor, xt: Tensor, t: int, before: int, eta: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step of `sample`, from t to `before` (below 0: no noise is left).

        Returns:
            The predicted x_0, clipped if `clamp`, and the values at `before`.
        """
        alphas = self.alphas().tolist()
        a, a_before = alphas[t], alphas[before] if before >= 0 else 1.0
        x0, noise = self.split(output, xt, torch.full((len(xt),), t, device=xt.device))
        if self.clamp:
            x0 = x0.clamp(-1, 1)
        # In double precision and bounded: in single precision, as the DDIM of diffusers has it, the
        # noise of a step from pure noise can come out above all there is, and its rest as NaN.
        variance = (1 - a_before) / (1 - a) * (1 - a / a_before)
        sigma = eta * math.sqrt(max(variance, 0.0))
        out = math.sqrt(a_before) * x0 + math.sqrt(max(1 - a_before - sigma**2, 0.0)) * noise
        if sigma > 0:
            fresh = torch.randn(xt.shape, generator=generator, dtype=xt.dtype).to(xt.device)
            out = out + sigma * fresh
        return x0, out


def timesteps(total: int, steps: int, spacing: Spacing = "trailing") -> list[int]:
    """Steps visited, from noisy to clean.

    `trailing` starts at the last step and `leading` ends at the first; their stride is
    total // steps, so that `trailing` visits more than `steps` where they do not divide `total`.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"steps={steps} must lie in 1..{total}")
    stride = total // steps
    if spacing == "trailing":
        return [t - 1 for t in range(total, 0, -stride)]
    if spacing == "leading":
        return [stride * i for i in reversed(range(steps))]
    if spacing == "linspace":
        gap = (total - 1) / max(steps - 1, 1)
        return [total - 1 - round(gap * i) for i in range(steps)]
    raise ValueError(f"spacing={spacing!r}: choose one of {', '.join(get_args(Spacing))}")


def _without_signal(alphas: Tensor) -> Tensor:
    """a_t [T] moved and scaled so that the last is 0 and the first stays (algorithm 1 of Lin et
    al.), rounded as released: the last steps are differences of numbers that are nearly equal.

    By NumPy, whose roots are rounded rightly on every CPU. Torch's are not (a fifth of them is one
    bit off on AMD's), which moves the last betas by 4e-6.
    """
    roots = np.sqrt(alphas.numpy())
    first, last = roots[0], roots[-1]
    squares = np.square((roots - last) * (first / (first - last)))
    # By way of betas, as these are what is stored.
    ratios = torch.from_numpy(np.concatenate([squares[:1], squares[1:] / squares[:-1]]))
    return torch.cumprod(1 - (1 - ratios), 0)


def _shifted_cosine(steps: int, shift: float) -> Tensor:
    """Cosine schedule with its log signal-to-noise ratio lowered by 2 log(shift)."""
    angle = torch.linspace(0, 1, steps, dtype=torch.float64) * math.pi / 2
    log_snr = -2 * (math.log(shift) + angle.tan().log())
    # Rounded as released: single precision decides how much noise the first step carries.
    alphas = log_snr.clamp(max=_MAX_LOG_SNR).float().sigmoid()
    alphas[-1] = 0
    return alphas
