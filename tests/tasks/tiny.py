"""A 4M with random weights and tokenizers that need no training, for tests of what uses them."""

from __future__ import annotations

import numpy as np

from models.fourm.model import FourM
from models.fourm.spec import FourMConfig, ModalitySpec
from tokenizers_vq.text import TextTokenizer

SIDE, GRID = 64, 4


class Coarse:
    """A tokenizer of one code a patch, without learning: an index into values it has seen."""

    def __init__(self, name: str) -> None:
        self.name = name

    def encode_values(self, values: list[np.ndarray]) -> np.ndarray:
        maps = np.stack(values).astype(np.float32)
        grey = maps.reshape(len(maps), GRID, 16, GRID, 16, -1).mean((2, 4, 5))
        low = -1.0 if self.name == "normal" else 0.0
        top = {"rgb": 255.0, "semseg": 5.0}.get(self.name, 1.0)
        codes = np.clip((grey - low) / (top - low) * 15, 0, 15)
        return codes.reshape(len(maps), -1).round().astype(np.uint16)

    def decode_tokens(self, tokens: np.ndarray) -> list[np.ndarray]:
        grid = np.asarray(tokens).reshape(-1, GRID, GRID).repeat(16, 1).repeat(16, 2) / 15
        if self.name == "rgb":
            return list(np.rint(grid[..., None].repeat(3, -1) * 255).astype(np.uint8))
        if self.name == "semseg":
            return list(np.rint(grid * 5).astype(np.uint8))
        if self.name == "normal":
            return list(np.stack([grid * 0, grid, 1 - grid], -1).astype(np.float32))
        return list(grid.astype(np.float32))


class Codes:
    """A tokenizer of vectors in -1..1: a code a number, 16 steps."""

    def encode_values(self, values: list[np.ndarray]) -> np.ndarray:
        return np.clip((np.stack(values) + 1) / 2 * 15, 0, 15).round().astype(np.uint16)

    def decode_tokens(self, tokens: np.ndarray) -> list[np.ndarray]:
        return list((np.asarray(tokens) / 15 * 2 - 1).astype(np.float32))


def network(text: TextTokenizer, vector: int = 0) -> FourM:
    """With `vector` above 0 also of vectors "dinov2_global" of so many numbers."""
    grids = [
        ModalitySpec(name=f"tok_{name}@{SIDE}", kind="img", max_tokens=GRID**2, vocab_size=16)
        for name in ("rgb", "depth", "normal", "semseg")
    ]
    words = [
        ModalitySpec(name=name, kind="seq", max_tokens=48, vocab_size=text.vocab_size)
        for name in ("caption", "det")
    ]
    pixels = ModalitySpec(
        name=f"rgb@{SIDE}", kind="pixels", max_tokens=GRID**2, patch_size=16, is_target=False
    )
    vectors = [
        ModalitySpec(name="tok_dinov2_global", kind="img", max_tokens=vector, vocab_size=16,
                     learned_positions=True)
    ] if vector else []  # fmt: skip
    config = FourMConfig(
        modalities=(pixels, *grids, *words, *vectors), dim=32, encoder_depth=1,
        decoder_depth=1, num_heads=2,
    )
    return FourM(config).eval()
