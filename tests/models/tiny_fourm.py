"""A 4M with random weights, tokenizers that need no training, and conditions for it."""

from __future__ import annotations

import math

import numpy as np
import torch

from models.fourm.conditions import Shown
from models.fourm.model import FourM
from models.fourm.spec import FourMConfig, ModalitySpec
from tokenizers_vq.text import TextTokenizer, train_text_tokenizer

GRID, CODES = 16, 11


class Grey:
    """Codes are mean grey levels of patches of 16 pixels."""

    def __init__(self, colours: bool = False) -> None:
        self.colours = colours

    def encode_values(self, values: list[np.ndarray]) -> np.ndarray:
        maps = np.stack(values).astype(np.float32)
        side = maps.shape[1] // 16
        grey = maps.reshape(len(maps), side, 16, side, 16, -1).mean((2, 4, 5))
        top = 256 if self.colours else 1
        codes = np.clip(grey * CODES / top, 0, CODES - 1)
        return codes.reshape(len(maps), -1).astype(np.uint16)

    def decode_tokens(self, tokens: np.ndarray) -> list[np.ndarray]:
        side = math.isqrt(tokens.shape[1])
        grid = tokens.reshape(-1, side, side).repeat(16, 1).repeat(16, 2) / CODES
        if self.colours:
            return list(np.rint(grid[..., None].repeat(3, -1) * 255).astype(np.uint8))
        return list(grid.astype(np.float32))


def small_text() -> TextTokenizer:
    corpus = ["a large red metal cube left of a small sphere"] * 3
    return train_text_tokenizer(corpus, class_names=("cube", "sphere"), bins=8, vocab_size=320)


def grids(side: int, *names: str) -> list[ModalitySpec]:
    tokens = (side // 16) ** 2
    return [ModalitySpec(name=f"tok_{name}@{side}", kind="img", max_tokens=tokens,
                         vocab_size=CODES) for name in names]  # fmt: skip


def network(text: TextTokenizer, *specs: ModalitySpec) -> FourM:
    """A network over these modalities; by default pixels, RGB, depth, captions and boxes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    words = [ModalitySpec(name=name, kind="seq", max_tokens=12, vocab_size=text.vocab_size)
             for name in ("caption", "det")]  # fmt: skip
    pixels = ModalitySpec(name="rgb@64", kind="pixels", max_tokens=GRID, is_target=False)
    chosen = specs or (pixels, *grids(64, "rgb", "depth"), *words)
    config = FourMConfig(
        modalities=chosen, dim=32, encoder_depth=2, decoder_depth=2, num_heads=2
    )
    net = FourM(config).eval()
    with torch.no_grad():  # spread the scores, so that random weights are not undecided
        net.heads.weight.mul_(40)
    return net


def tokens(rows: int, seed: int = 0) -> Shown:
    """Random tokens of a whole grid."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, CODES, (rows, GRID), generator=generator)
    return Shown(ids, torch.ones_like(ids, dtype=torch.bool))


def words(rows: int, *ids: int) -> Shown:
    """The same text in every row."""
    values = torch.tensor([ids] * rows)
    return Shown(values, torch.ones_like(values, dtype=torch.bool))


def picture(seed: int = 0) -> np.ndarray:
    """Noise, uint8 [64, 64, 3]."""
    return np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8)
