"""What runs on a GPU leaves nothing on the CPU and computes the same; see `tests.pretend_gpu`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models.fourm.backbone import Backbone, embed, pool
from models.fourm.decoding import Decoding, draw
from models.fourm.generate import Generator
from models.fourm.guidance import Branch
from models.fourm.model import FourM
from models.fourm.values import Part
from tests.models.test_fourm_compile import CONFIG, make_batch
from tests.models.tiny_fourm import Grey, network, picture, small_text, tokens, words
from tests.pretend_gpu import GPU, READS, gpu, moved, on_cpu
from tokenizers_vq.text import TextTokenizer


def test_the_stand_in_refuses_what_a_gpu_refuses() -> None:
    with gpu():
        there, here = torch.arange(6.0, device="cuda"), torch.arange(6.0)
        assert (there * 2 + torch.tensor(1.0)).device == GPU
        assert torch.equal(there[torch.tensor([1, 2])].cpu(), here[1:3])
        assert there.new_zeros(2).device == torch.rand(2, device="cuda").device == GPU
        for mixed in (
            lambda: there + here, lambda: torch.cat([there, here]), lambda: here[there.long()],
            lambda: there.index_select(0, here.long()), lambda: nn.Linear(6, 1)(there),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match="of cuda:0 and of the CPU meet"):
                mixed()
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            np.asarray(there)


def _step(device: torch.device | str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = FourM(CONFIG).to(device)
    losses = model(make_batch(0).to(torch.device(device)))
    losses.total.backward()
    return losses.total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_a_training_step_of_4m_is_that_of_the_cpu_and_never_waits_for_a_number() -> None:
    wanted = _step("cpu")
    with gpu():
        found = _step("cuda")
        assert not READS.total(), READS
        assert all(value.device == GPU for value in found[1].values())
        torch.testing.assert_close(on_cpu(found), wanted)
        with torch.autocast("cuda", torch.bfloat16):
            rounded, _ = _step("cuda")
        assert not READS.total(), READS
    torch.testing.assert_close(on_cpu(rounded), wanted[0], atol=0.05, rtol=0.02)


def test_a_tensor_that_stays_behind_ends_a_training_step() -> None:
    with gpu():
        model: Any = FourM(CONFIG).to("cuda")
        model.is_grid = on_cpu(model.is_grid)
        with pytest.raises(RuntimeError, match="of cuda:0 and of the CPU meet"):
            model(make_batch(0).to(GPU))


CAPTION = words(2, 210, 230, 3)
WAYS: dict[str, dict[str, Any]] = {
    "maskgit": {"order": "maskgit", "top_p": 0.9},
    "roar": {"order": "roar", "top_k": 4},
    "halton": {"order": "halton", "temperature": 0.0},
    "remask": {"order": "maskgit", "remask": 0.4, "guidance": 2.0},
    "weights": {"order": "roar", "guidance": {"tok_rgb@64": 2.0, "caption": -0.5}},
    "branches": {"order": "maskgit"},
    "caption": {"order": "autoregressive", "guidance": 1.5, "top_p": 0.9},
    "det": {"order": "autoregressive"},
}


@pytest.fixture(scope="module")
def text() -> TextTokenizer:
    return small_text()


@pytest.mark.parametrize(("way", "copies"), [*((way, 2) for way in WAYS), ("maskgit", 1)])
def test_tokens_drawn_on_a_gpu_are_those_of_the_cpu(
    text: TextTokenizer, way: str, copies: int
) -> None:
    target = way if way in ("caption", "det") else "tok_depth@64"
    decoding, found = Decoding(**({"steps": 3} | WAYS[way])), []
    for device in ("cpu", "cuda"):
        with gpu():
            model = network(text).to(device)
            place = torch.device(device)
            shown = {name: _there(part, place)
                     for name, part in {"tok_rgb@64": tokens(2), "caption": CAPTION}.items()
                     if name != target}  # fmt: skip
            other = Branch({"caption": _there(words(2, 240, 3), place)}, 1.5)
            found.append(on_cpu(vars(draw(
                model, shown, target, decoding, [5, 6], copies=copies,
                branches=[other] if way == "branches" else [],
            ))))  # fmt: skip
    torch.testing.assert_close(found[1], found[0])


def _there(part: Any, device: torch.device) -> Any:
    return type(part)(part.values.to(device), part.visible.to(device))


def test_a_generator_on_a_gpu_chains_fills_and_votes_as_on_the_cpu(text: TextTokenizer) -> None:
    found = []
    for device in ("cpu", "cuda"):
        with gpu():
            coarse: Any = {"rgb": Grey(colours=True), "depth": Grey()}
            generator = Generator(network(text).to(device), coarse, text)
            boxes = {"det": Decoding(order="autoregressive", well_formed=True)}
            made = generator.generate(
                {"rgb": [picture(0), None], "caption": [None, "a red cube"]},
                ["depth", "det"], num_samples=2, settings=boxes,
            )
            area = np.zeros((64, 64), bool)
            area[:32, :32] = True
            made["inpainted"] = generator.inpaint("rgb", picture(1), area, num_samples=2)
            holes = generator.generate({"caption": Part("a red ___ left of a ___")}, ["caption"])
            made["holes"] = holes["caption"]
            found.append(made)
    for name, one in found[0].items():
        np.testing.assert_array_equal(found[1][name].tokens, one.tokens, name)


def test_embeddings_on_a_gpu_are_those_of_the_cpu(text: TextTokenizer) -> None:
    pixels = torch.from_numpy(picture(0)).permute(2, 0, 1)[None]
    ids, said = tokens(1).values, torch.tensor([[210, 230, 3, 0, 0]])
    found = []
    for device in ("cpu", "cuda"):
        with gpu():
            model = network(text)
            vit = Backbone.of(model).to(device)
            model = model.to(device)
            given = {"rgb@64": pixels, "tok_rgb@64": ids, "caption": said}
            vectors = pool(embed(model, {k: v.to(device) for k, v in given.items()}))
            wide = torch.cat([pixels, pixels], 3).to(device)
            found.append(on_cpu([vectors, vit(wide), vit(pixels.to(device))]))
    torch.testing.assert_close(found[1], found[0])
    assert moved(nn.Linear(1, 1)).weight.device == GPU
