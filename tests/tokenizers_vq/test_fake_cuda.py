"""Released tokenizers on a GPU compute what they do on the CPU; see `tests.pretend_gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.pretend_gpu import gpu, on_cpu
from tests.tokenizers_vq.test_controlnet import _net as controlnet
from tests.tokenizers_vq.test_product import small as product
from tests.tokenizers_vq.test_released import _input, _net
from tokenizers_vq.losses import LOSSES
from tokenizers_vq.released.network import Sampling

FAMILIES = ("rgb", "semseg", "human_poses", "depth", "normal", "controlnet", "product")

QUICK = ("semseg", "human_poses")


def _made(family: str) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    if family == "product":
        return product().net, torch.randn(4, 6, 1, 1)
    if family == "controlnet":
        return controlnet(), torch.rand(2, 3, 32, 32) * 2 - 1
    return _net(family), _input(family)


def _through(family: str, device: str) -> list[Any]:
    """A step of training, then tokens and back."""
    net, x = _made(family)
    net, x = net.to(device), x.to(device)
    torch.manual_seed(1)
    net.train()
    if getattr(net, "diffusion", None) is None:
        given: tuple[Any, ...] = (x,)
    else:
        clean = net.clean(x)
        given = (x, torch.randn_like(clean), torch.tensor([3, 900]).to(device), None, clean)
    output, quantized = net(*given)
    (output.square().mean() + quantized.loss).backward()
    moved = [p.grad.norm() for p in net.parameters() if p.grad is not None]
    net.eval()
    net.sampling = Sampling(steps=2, guidance=2.0, eta=0.5)
    with torch.no_grad():
        tokens = net.encode(x)
        return on_cpu([output.detach(), moved, tokens, net.decode(tokens)])


@pytest.mark.parametrize("family", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES
])  # fmt: skip
def test_a_step_of_training_and_the_way_there_and_back_are_those_of_the_cpu(family: str) -> None:
    wanted = _through(family, "cpu")
    with gpu():
        found = _through(family, "cuda")
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_are_those_of_the_cpu_and_read_nothing(kind: str) -> None:
    torch.manual_seed(0)
    classes = kind == "semseg"
    pred = torch.randn(2, 5 if classes else 3, 8, 8)
    true = torch.randint(0, 5, (2, 8, 8), dtype=torch.uint8) if classes else torch.rand(2, 3, 8, 8)
    with gpu():
        found = LOSSES[kind](pred.to("cuda"), true.to("cuda"))
    torch.testing.assert_close(on_cpu(found), LOSSES[kind](pred, true))
