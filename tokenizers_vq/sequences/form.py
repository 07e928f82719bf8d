"""What a modality says of its text form, and the page that a text is written on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenizers_vq.sequences.words import BINS

if TYPE_CHECKING:
    from tokenizers_vq.text import TextTokenizer


class Codes(Protocol):
    """A learned tokenizer whose codes stand in a text."""

    @property
    def vocab_size(self) -> int:
        """Number of codes."""

    def encode_values(self, values: Any) -> NDArray[np.uint16]:
        """Values to codes [B, N]."""

    def decode_tokens(self, tokens: Any) -> list[NDArray[Any]]:
        """Codes [B, N] to values."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a text depends on beside the value that it tells."""

    bins: int = BINS
    """Numbers that a coordinate word can hold."""
    size: int = 224
    """Side of the crop in pixels."""
    codes: Codes | None = None
    """The tokenizer of what the modality tells in codes, where it does."""
    seed: int = 0
    """Of what the format leaves to chance, such as which of several palettes is told."""
    min_score: float | None = None
    """Least confidence of what is told; None is the form's own."""

    @property
    def rng(self) -> np.random.Generator:
        """Fresh random numbers of the seed."""
        return np.random.default_rng(self.seed)


def seed_of(modality: str, key: str, crop: int) -> int:
    """The seed of a sample's crop, the same wherever and whenever it is written."""
    digest = hashlib.sha256(f"{modality}:{key}:{crop}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What of a value goes through a learned tokenizer, to stand in the text as codes."""

    of: Callable[[Any], list[NDArray[Any]]]
    """The parts of a value, arrays of one shape."""
    show: Callable[[NDArray[Any]], NDArray[np.uint8]]
    """A part as a picture uint8 [H, W, 3]."""
    count: int
    """Codes of a part."""
    most: Callable[[int], int]
    """Number of bins to the number of codes that words can tell apart."""


@dataclass(frozen=True, kw_only=True)
class TextForm:
    """How the values of a sequence modality are written as text and read back."""

    write: Callable[[Any, Page], str]
    """The text of a value."""
    read: Callable[[str, Page], Any]
    """The value of a text, also of one that a model wrote badly."""
    words: tuple[str, ...] = ()
    """Ordinary words of the format, which the text tokenizer must hold."""
    min_bins: int = 2
    """Least number of coordinate bins that the format needs."""
    whole: bool = False
    """Whether the text tells the whole picture, so that all crops share it."""
    min_score: float | None = None
    """Least confidence that is told, where the format leaves out what is unsure."""
    parts: Parts | None = None
    """What the text tells in codes of a learned tokenizer of the same modality."""
    read_scored: (
        Callable[[Sequence[int], NDArray[np.float32], TextTokenizer], Any] | None
    ) = None
    """(ids, confidence of each, text tokenizer) to a value with scores, where it has some."""
    grammar: str = ""
    """Name of its grammar in `models.fourm.grammar`; empty is the modality's."""

    def check_bins(self, name: str, bins: int) -> None:
        """Raises ValueError where the text tokenizer has too few coordinate bins for it."""
        if bins < self.min_bins:
            raise ValueError(
                f"{name} is written with at least {self.min_bins} coordinate bins, not {bins}"
            )
