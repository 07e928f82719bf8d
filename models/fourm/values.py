"""Values to tokens of a trained 4M and back: pictures, maps, texts and boxes, whole or in part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from models import modalities
from models.fourm.batch import patchify
from models.fourm.catalogue import SIZE
from models.fourm.conditions import FIRST, Shown
from models.fourm.model import FourM
from models.fourm.presets import base_name, resolution
from models.fourm.spec import EOS_ID, NUM_SENTINELS, ModalitySpec
from models.fourm.vectors import pad_vectors, valid_vectors
from models.modalities import text_form
from tokenizers_vq.sequences.boxes import read_boxes
from tokenizers_vq.sequences.form import Page, TextForm

if TYPE_CHECKING:
    from models.fourm.decoding import Drawn
    from tokenizers_vq.text import TextTokenizer
    from tokenizers_vq.tokenizer import Tokenizer

__all__ = ["Part", "Tokens", "Translator", "given_tokens", "read_boxes"]

HOLE = "___"
"""Stands in a text for words that are not known."""
MOST_HOLES = NUM_SENTINELS - 2
"""[S_0] stands for none of them, and one more sentinel closes what is written into them."""


@dataclass(frozen=True)
class Part:
    """A condition of which only some tokens are given.

    Attributes:
        value: As its modality takes it. A text holds `___` in the place of what is not known:
            "a red ___ left of a ___ sphere".
        mask: What is given of a picture or map: bool over pixels [H, W] or tokens [h, w]. A token
            is given if all its pixels are. None for texts.
    """

    value: Any
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Tokens:
    """A condition as the token ids [L] of a grid instead of a value."""

    ids: np.ndarray


def row_count(
    given: Sequence[Mapping[str, Sequence[Any]]], seeds: Sequence[int] | None
) -> int:
    """Rows of all conditions and of the seeds. Raises ValueError where they differ, or for none."""
    counts = {name: len(values) for part in given for name, values in part.items()}
    sizes = {len(values) for part in given for values in part.values()}
    if seeds is not None:
        counts["seeds"] = len(seeds)
        sizes.add(len(seeds))
    if not sizes or min(sizes) < 1:
        raise ValueError("generation needs at least one condition or seed")
    if len(sizes) > 1:
        raise ValueError(f"conditions must be of one length, not {counts}")
    return sizes.pop()


def alike(
    given: Sequence[Mapping[str, Sequence[Any]]], rows: int, most: int
) -> list[list[int]]:
    """Numbers of rows that are given the same modalities in the same form, up to `most` together.

    Args:
        given: Sets of conditions: values a modality, one a row; None where a row lacks it.
        rows: Rows of all of them.
        most: Rows of a group.
    """
    found: dict[tuple[type, ...], list[int]] = {}
    for row in range(rows):
        values = (values[row] for part in given for values in part.values())
        forms = (type(value) for value in values)
        kind = tuple(form if form in (Part, Tokens, type(None)) else object for form in forms)
        found.setdefault(kind, []).append(row)
    return [group[i : i + most] for group in found.values() for i in range(0, len(group), most)]


class Translator:
    """A trained model's modalities in the words of the catalogue.

    Args:
        model: The network; put in evaluation mode.
        tokenizers: A tokenizer for each modality of grids and for each text that holds codes, by
            catalogue name.
        text: The tokenizer of all sequences.
        forms: Text forms other than those of the catalogue, by catalogue name.
    """

    def __init__(
        self, model: FourM, tokenizers: Mapping[str, Tokenizer], text: TextTokenizer,
        forms: Mapping[str, TextForm] | None = None,
    ) -> None:
        self.model = model.eval()
        self.forms = dict(forms or {})
        self.tokenizers = dict(tokenizers)
        self.text = text

    @property
    def inputs(self) -> list[str]:
        """Modalities that conditions may be given in."""
        return sorted({base_name(spec.name) for spec in self.model.config.inputs})

    @property
    def targets(self) -> list[str]:
        """Modalities that can be generated."""
        return sorted({base_name(spec.name) for spec in self.model.config.targets})

    def spec(self, name: str, target: bool) -> ModalitySpec:
        """The model's modality behind a name of the catalogue, or behind its own ("tok_rgb@224").

        Where there are several, an input is pixels rather than tokens and of the lowest
        resolution, a target of the highest.

        Raises:
            ValueError: there is none; lists the choices.
        """
        specs = self.model.config.targets if target else self.model.config.inputs
        found = [spec for spec in specs if name in (spec.name, base_name(spec.name))]
        if not found:
            what, names = ("generated", self.targets) if target else ("an input", self.inputs)
            raise ValueError(f"{name!r} cannot be {what}; choose from {', '.join(names)}")
        if target:
            return max(found, key=lambda spec: resolution(spec.name))
        return min(found, key=lambda spec: (spec.kind != "pixels", resolution(spec.name)))

    def show(
        self, conditions: Mapping[str, Sequence[Any]], targets: Iterable[str] = ()
    ) -> dict[str, Shown]:
        """Values of conditions as the encoder takes them, by the model's own names.

        Args:
            conditions: Values a modality, one a row; None where a row lacks it.
            targets: Names of what is generated: a `Part` of one of them is shown as its tokens.
        """
        shown, wanted = {}, set(targets)
        for name, values in conditions.items():
            spec = self._shown_spec(name, values, name in wanted)
            present = torch.tensor([value is not None for value in values])
            if not bool(present.any()):
                continue
            some = next(value for value in values if value is not None)
            part = self.shown_as(spec, [some if value is None else value for value in values])
            part = Shown(part.values, part.visible & present.unsqueeze(1))
            device = self.model.mask_token.device
            shown[spec.name] = Shown(part.values.to(device), part.visible.to(device))
        return shown

    def _shown_spec(self, name: str, values: Sequence[Any], target: bool) -> ModalitySpec:
        spec = self.spec(name, target=False)
        if spec.kind == "pixels" and any(isinstance(value, Tokens) for value in values):
            spec = self._token_spec(name)
        if target and any(isinstance(value, Part) for value in values):
            spec = self.spec(name, target=True)
            if not spec.is_input:
                raise ValueError(f"{name!r} cannot be given in part: the model never reads it")
        return spec

    def _token_spec(self, name: str) -> ModalitySpec:
        """The input of the lowest resolution that is a grid of tokens."""
        found = [spec for spec in self.model.config.inputs
                 if spec.kind == "img" and name in (spec.name, base_name(spec.name))]  # fmt: skip
        if not found:
            raise ValueError(f"{name!r} is no grid of tokens to this model")
        return min(found, key=lambda spec: resolution(spec.name))

    def shown_as(self, spec: ModalitySpec, values: Sequence[Any]) -> Shown:
        """Values as the tokens (or vectors) of one of the model's modalities.

        Raises:
            ValueError: their number is not the model's, or a tokenizer is missing.
        """
        if spec.kind == "seq":
            return self._shown_text(spec, values)
        whole = [value.value if isinstance(value, Part) else value for value in values]
        if spec.kind == "seq_emb":
            return _shown_vectors(spec, whole)
        if spec.kind == "pixels":
            pictures = [_picture(spec, value) for value in whole]
            vectors = torch.from_numpy(patchify(np.stack(pictures), spec.patch_size))
        else:
            vectors = torch.from_numpy(self._grid_ids(spec, whole))
        if vectors.shape[1] != spec.max_tokens:
            raise ValueError(
                f"{base_name(spec.name)} gives {vectors.shape[1]} tokens, the model takes "
                f"{spec.max_tokens}; resize the input to the model's resolution"
            )
        visible = torch.ones(vectors.shape[:2], dtype=torch.bool)
        for row, value in enumerate(values):
            if isinstance(value, Part):
                visible[row] = given_tokens(spec, value.mask)
        return Shown(vectors, visible)

    def _grid_ids(self, spec: ModalitySpec, values: Sequence[Any]) -> np.ndarray:
        raw = [value for value in values if not isinstance(value, Tokens)]
        encoded = iter(self._tokenizer(spec).encode_values(raw).astype(np.int64) if raw else ())
        rows = [_token_ids(spec, value) if isinstance(value, Tokens) else next(encoded)
                for value in values]  # fmt: skip
        for height, width in (np.shape(value)[:2] for value in raw if np.ndim(value) > 1):
            if height != width:
                raise ValueError(f"{base_name(spec.name)} is square to the model, not "
                                 f"{width} x {height}: crop it")  # fmt: skip
        ids = np.stack(rows)
        if ids.size and not 0 <= ids.min() <= ids.max() < spec.vocab_size:
            raise ValueError(f"tokens of {spec.name} lie in 0..{spec.vocab_size - 1}, "
                             f"not {ids.min()}..{ids.max()}")  # fmt: skip
        return ids

    def _shown_text(self, spec: ModalitySpec, values: Sequence[Any]) -> Shown:
        name = base_name(spec.name)
        lines = self._lines(name, values)
        for line, value in zip(lines, values, strict=True):
            if isinstance(value, Part) and len(line) > spec.max_tokens:
                raise ValueError(f"a text with holes must not be cut: it has {len(line)} tokens, "
                                 f"{name} takes {spec.max_tokens}: {value.value!r:.80}")
        most = max((max(line) for line in lines if line), default=0)
        if most >= spec.vocab_size:
            raise ValueError(f"{name} has no token {most}, the model knows {spec.vocab_size}: the "
                             "text tokenizer is not the one that it was trained with")
        ids = [[*line, EOS_ID][: spec.max_tokens] for line in lines]
        table = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
        visible = torch.zeros(table.shape, dtype=torch.bool)
        for row, line in enumerate(ids):
            table[row, : len(line)] = torch.tensor(line)
            visible[row, : len(line)] = True
        return Shown(table, visible)

    def _lines(self, name: str, values: Sequence[Any]) -> list[list[int]]:
        """Ids of texts, texts with holes and values with a text form, without [EOS]."""
        pieces: list[list[str]] = []
        for value in values:
            if isinstance(value, Part):
                if not isinstance(value.value, str) or HOLE not in value.value:
                    raise ValueError(f"a part of a text has holes, written {HOLE}: {value.value!r}")
                pieces.append(value.value.split(HOLE))
                if len(pieces[-1]) > MOST_HOLES + 1:
                    raise ValueError(f"a text has at most {MOST_HOLES} holes, not "
                                     f"{len(pieces[-1]) - 1}: {value.value!r:.80}")
            elif isinstance(value, str):
                pieces.append([value])
            else:
                pieces.append([self.written(name, value)])
        # Holes alone are sentinels: what looks like one in a text is words, as in training.
        encoded = iter(self.text.encode_batch([piece for line in pieces for piece in line]))
        lines = []
        for line in pieces:
            ids = next(encoded)
            for number in range(len(line) - 1):
                ids = [*ids, FIRST + number, *next(encoded)]
            lines.append(ids)
        return lines

    def _tokenizer(self, spec: ModalitySpec) -> Tokenizer:
        name = base_name(spec.name)
        if name not in self.tokenizers:
            have = ", ".join(sorted(self.tokenizers)) or "none"
            raise ValueError(f"no tokenizer for {name!r}; there are {have}")
        return self.tokenizers[name]

    def values_of(self, spec: ModalitySpec, drawn: Drawn) -> list[Any]:
        """The value of every row of decoded tokens."""
        if spec.kind != "seq":
            return self._tokenizer(spec).decode_tokens(drawn.ids.cpu().numpy())
        confidence = drawn.confidence.float().cpu().numpy()
        found: list[Any] = []
        name = base_name(spec.name)
        form = self.form(name)
        lines = zip(drawn.ids.tolist(), drawn.lengths.tolist(), strict=True)
        for row, (ids, length) in enumerate(lines):
            ids = ids[: int(length)]
            ids = ids[: ids.index(EOS_ID)] if EOS_ID in ids else ids
            if form is not None and form.read_scored is not None:
                found.append(form.read_scored(ids, confidence[row], self.text))
            else:
                found.append(self.read(name, self.text.decode(ids)))
        return found

    def form(self, name: str) -> TextForm | None:
        """How values of a modality are written; None where only their text is known."""
        return self.forms.get(name) or text_form(name)

    def page(self, name: str) -> Page:
        """What texts of a modality are written on."""
        sides = [resolution(spec.name) for spec in self.model.config.modalities]
        size = min((side for side in sides if side), default=SIZE)  # finer sets have no texts
        # What is given is meant, however sure a model was that found it.
        return Page(bins=self.text.bins, size=size, codes=self.tokenizers.get(name), min_score=0)

    def written(self, name: str, value: Any) -> str:
        """The text of a value. Raises ValueError where the modality has no text form, or the value
        is none of its."""
        form = self.form(name)
        if form is None:
            raise ValueError(f"{name!r} has no text form: give it as text, not as {type(value)}")
        try:
            return form.write(value, self.page(name))
        except (TypeError, KeyError, IndexError, AttributeError) as error:
            takes = modalities.get(name).description if name in modalities.names() else "its values"
            raise ValueError(f"{name} takes {takes}; {value!r:.80} is none of them") from error

    def read(self, name: str, text: str) -> Any:
        """The value of a text, or the text itself where the modality has no text form."""
        form = self.form(name)
        return text if form is None else form.read(text, self.page(name))


def _token_ids(spec: ModalitySpec, value: Tokens) -> np.ndarray:
    """Ids int64 [L] of a grid of the model. Raises ValueError for others."""
    ids = np.asarray(value.ids)
    if ids.shape != (spec.max_tokens,) or ids.dtype.kind not in "iu":
        raise ValueError(f"tokens of {spec.name} are {spec.max_tokens} whole numbers, not "
                         f"{ids.dtype} {list(ids.shape)}")
    return ids.astype(np.int64)


def given_tokens(spec: ModalitySpec, mask: np.ndarray | None) -> Tensor:
    """Tokens bool [L] of a grid that a mask over pixels or tokens gives whole.

    Raises:
        ValueError: there is no mask, or it does not divide into the grid's cells.
    """
    side = spec.grid
    if mask is None or np.ndim(mask) != 2 or any(n % side or not n for n in np.shape(mask)):
        shape = "no mask" if mask is None else f"a mask of shape {np.shape(mask)}"
        raise ValueError(f"a part of {base_name(spec.name)} needs a mask [H, W] whose sides are "
                         f"multiples of {side}, not {shape}")  # fmt: skip
    height, width = (n // side for n in np.shape(mask))
    cells = np.asarray(mask, bool).reshape(side, height, side, width).all((1, 3))
    return torch.from_numpy(cells.reshape(-1))


def _picture(spec: ModalitySpec, value: Any) -> np.ndarray:
    """A picture uint8 [H, W, C] of the model's size. Raises ValueError for anything else."""
    picture, side = np.asarray(value), spec.grid * spec.patch_size
    if picture.ndim != 3 or picture.shape[2] != spec.channels or picture.dtype != np.uint8:
        raise ValueError(f"{base_name(spec.name)} takes pictures uint8 [H, W, {spec.channels}] "
                         f"with values in 0..255, not {picture.dtype} {list(picture.shape)}")
    if picture.shape[:2] != (side, side):
        raise ValueError(f"{base_name(spec.name)} takes pictures of {side} x {side} pixels, not "
                         f"{picture.shape[1]} x {picture.shape[0]}; resize the input to the "
                         "model's resolution")
    return picture


def _shown_vectors(spec: ModalitySpec, values: Sequence[Any]) -> Shown:
    """Feature vectors [L, C], or `emb` with `mask_valid`, of any lengths. Raises ValueError where
    some are no finite numbers: all that is generated from them would mean nothing."""
    tables = [valid_vectors(value) for value in values]
    if not all(np.isfinite(table).all() for table in tables):
        raise ValueError(f"{base_name(spec.name)} takes finite numbers, but some are none")
    vectors, length = pad_vectors(spec, tables)
    visible = np.arange(vectors.shape[1]) < length[:, None]
    return Shown(torch.from_numpy(vectors), torch.from_numpy(visible))
