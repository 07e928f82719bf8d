"""What tests of generation share: a tiny 4M with random weights, and what turns its tokens into
values."""

from __future__ import annotations

import pytest

from models.fourm.generate import Generator
from models.fourm.model import FourM
from tests.models.tiny_fourm import Grey, network, small_text
from tokenizers_vq.text import TextTokenizer


@pytest.fixture(scope="module")
def text() -> TextTokenizer:
    return small_text()


@pytest.fixture(scope="module")
def model(text: TextTokenizer) -> FourM:
    return network(text)


@pytest.fixture(scope="module")
def generator(model: FourM, text: TextTokenizer) -> Generator:
    coarse = {"rgb": Grey(colours=True), "depth": Grey()}
    return Generator(model, coarse, text)  # type: ignore[arg-type]
