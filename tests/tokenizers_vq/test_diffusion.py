"""Noise schedules and samplers."""

import pytest
import torch

from tokenizers_vq.diffusion import Diffusion, timesteps

torch.set_num_threads(1)
SCHEDULES = [
    "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "shifted_cosine:0.5",
    "shifted_cosine:1.0",
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_signal_falls_from_nearly_one_to_nothing(schedule):
    alphas = Diffusion(schedule=schedule).alphas()
    assert alphas[0] > 0.99
    assert alphas[-1] == 0
    assert (alphas.diff() <= 0).all()


def test_schedules_have_their_published_ends():
    betas = Diffusion(zero_terminal_snr=False).betas()
    assert betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.02], abs=1e-6)
    middle = Diffusion(schedule="shifted_cosine:1.0", steps=3).alphas()[1]
    assert middle == pytest.approx(0.5)
    shifted = Diffusion(schedule="shifted_cosine:0.5", steps=3).alphas()[1]
    assert shifted == pytest.approx(0.8)  # the signal-to-noise ratio is 4 times as high


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v_prediction"])
def test_a_perfect_network_leads_back_to_the_values(prediction):
    diffusion = Diffusion(prediction=prediction, steps=100, zero_terminal_snr=False)
    x0, noise = torch.rand(2, 1, 4, 4) * 2 - 1, torch.randn(2, 1, 4, 4)
    start = diffusion.noisy(x0, noise, torch.tensor([99, 99]))

    def perfect(xt, t):
        a = diffusion.alphas()[t].view(-1, 1, 1, 1)
        return diffusion.target(x0, (xt - a.sqrt() * x0) / (1 - a).sqrt(), t)

    for eta in (0.0, 1.0):
        generator = torch.Generator().manual_seed(0)
        got = diffusion.sample(perfect, start, steps=10, eta=eta, generator=generator)
        assert torch.allclose(got, x0, atol=1e-3)


def test_pure_noise_is_decoded_by_predictions_that_can():
    for prediction in ("sample", "v_prediction"):
        diffusion = Diffusion(prediction=prediction)
        x, last = torch.randn(1, 1, 2, 2), torch.tensor([999])
        x0, noise = diffusion.split(torch.full_like(x, 0.5), x, last)
        assert torch.allclose(x0.abs(), torch.full_like(x, 0.5))
        assert torch.allclose(noise, x, atol=1e-6)


@pytest.mark.parametrize(("schedule", "late"), [
    ("linear", [0.271991491, 0.559588909, 0.75226593]),
    ("scaled_linear", [0.271315515, 0.559199274, 0.752046824]),
    ("sigmoid", [0.272727191, 0.560014904, 0.752506554]),
    ("squaredcos_cap_v2", [0.266409278, 0.560275793, 0.757967591]),
])
def test_last_steps_are_those_of_released_models_on_any_cpu(schedule, late):
    betas = Diffusion(schedule=schedule).betas()
    assert betas[-1] == 1
    assert betas[[993, 997, 998]].tolist() == pytest.approx(late, abs=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [10, 25, 50])
def test_sampling_with_noise_from_pure_noise_stays_finite(schedule, steps):
    diffusion = Diffusion(schedule=schedule)
    found = diffusion.sample(lambda x, t: x.sin(), torch.randn(1, 1, 4, 4), steps=steps, eta=1.0)
    assert found.isfinite().all()


def test_visited_steps():
    assert timesteps(1000, 4) == [999, 749, 499, 249]
    assert timesteps(1000, 3) == [999, 666, 333, 0]
    assert timesteps(1000, 3, "linspace") == [999, 499, 0]
    assert timesteps(1000, 3, "leading") == [666, 333, 0]
    with pytest.raises(ValueError, match=r"steps=0 must lie in 1\.\.1000"):
        timesteps(1000, 0)


def test_unknown_schedules_and_predictions_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="choose one of linear"):
        Diffusion(schedule="cosine")
    with pytest.raises(ValueError, match="choose one of sample"):
        Diffusion(prediction="x0")
