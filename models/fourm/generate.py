"""Values from values: any modalities of a trained 4M out of any others.

    generator = Generator(model, tokenizers, text)
    found = generator.generate({"rgb": image}, ["depth", "caption"], num_samples=10)
    found["depth"].value                     # ten samples averaged, float32 [H, W]
    generator.generate({"rgb": images}, ["depth"])["depth"].values       # one a picture

    generator.generate({"caption": Part("a red ___ on the floor")}, ["caption"])
    generator.inpaint("rgb", image, area, {"caption": "a blue cube"})
    generator.edit_boxes(image, boxes, moved)
    upscaler.upscale(found, {"rgb": image})  # a second Generator, of a super-resolution model

Modalities go by their names in the catalogue ("rgb", "depth", "det"), whatever the model's own
name for their tokens ("tok_depth@128").
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from infra.machine import fast_bf16
from models.fourm.conditions import Shown
from models.fourm.decoding import Decoding, Drawn, as_condition, draw
from models.fourm.editing import box_area, changed_boxes, pasted
from models.fourm.ensemble import Similarity, combine, word_overlap
from models.fourm.grammar import Grammar, grammar_for
from models.fourm.guidance import Branch
from models.fourm.model import FourM
from models.fourm.presets import UPSCALE_ORDER, base_name, default_decoding, resolution
from models.fourm.spec import ModalitySpec
from models.fourm.values import (
    Part,
    Tokens,
    Translator,
    alike,
    given_tokens,
    read_boxes,
    row_count,
)

if TYPE_CHECKING:
    from tokenizers_vq.sequences.form import TextForm
    from tokenizers_vq.text import TextTokenizer
    from tokenizers_vq.tokenizer import Tokenizer

__all__ = ["Generated", "Generator", "Guide", "Part", "Tokens", "base_name", "read_boxes"]


@dataclass(frozen=True)
class Guide:
    """Conditions that pull a result towards them, or push it away, with a weight of their own.

    Every step adds weight * (l_i - l) to the logits l under the plain conditions, l_i being those
    under the guide's conditions as well. Guides take the place of a guidance scale. None guides
    the generation of its own modality.

    Attributes:
        conditions: As for `Generator.generate`.
        weight: Negative to lead away.
    """

    conditions: Mapping[str, Any]
    weight: float


@dataclass(frozen=True)
class Generated:
    """What was generated for one target.

    Attributes:
        samples: A list a row, of its values one by one.
        values: One value a row: its samples combined, see `ensemble.combine`.
        tokens: uint16 or int64 [rows * samples, L], a row's samples behind one another.
        confidence: float32, of the same shape: the probability of each token.
    """

    samples: list[list[Any]]
    values: list[Any]
    tokens: np.ndarray
    confidence: np.ndarray

    @property
    def value(self) -> Any:
        """The value of the only row. Raises ValueError where there are several."""
        if len(self.values) != 1:
            raise ValueError(f"there are {len(self.values)} rows; take them from `values`")
        return self.values[0]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What all batches of one call share."""

    specs: Sequence[ModalitySpec]
    settings: Mapping[str, Decoding]
    copies: int
    chain: bool


class Generator(Translator):
    """A trained model together with what turns its tokens into values.

    Args:
        model: The network; put in evaluation mode.
        tokenizers: A tokenizer for each modality of grids and for each text that holds codes, by
            catalogue name.
        text: The tokenizer of all sequences.
        bf16: Whether to run in bf16, in which a row's result may depend on how many rows there are;
            None does so where this machine is fast at it.
        forms: Text forms other than those of the catalogue, by catalogue name.
    """

    def __init__(
        self,
        model: FourM,
        tokenizers: Mapping[str, Tokenizer],
        text: TextTokenizer,
        bf16: bool | None = False,
        forms: Mapping[str, TextForm] | None = None,
    ) -> None:
        super().__init__(model, tokenizers, text, forms)
        self.bf16 = fast_bf16() if bf16 is None else bf16
        self._grammars: dict[str, Grammar] = {}

    def generate(
        self,
        conditions: Mapping[str, Any],
        targets: Sequence[str],
        *,
        guides: Sequence[Guide] = (),
        settings: Mapping[str, Decoding] | None = None,
        num_samples: int = 1,
        seeds: Sequence[int] | None = None,
        chain: bool = True,
        batch_size: int = 64,
        similarity: Similarity = word_overlap,
    ) -> dict[str, Generated]:
        """Generates targets from conditions.

        Args:
            conditions: A value a modality, or a list of values, one a row; None where a row lacks
                it. A `Part` gives some tokens only: of a target itself, they are kept and the
                rest is generated.
            targets: What to generate, in this order.
            guides: Weighted conditions, any number of them.
            settings: How to decode a target; the released sampler's settings where absent.
            num_samples: Samples a row, combined in `Generated.values`.
            seeds: One a row, by default its number. A row's result depends on its seed alone, in
                bf16 up to the rounding of products, which may differ between batches.
            chain: Whether a generated target is a condition of those after it.
            batch_size: Rows run together, samples included.
            similarity: Likeness of two captions, to choose among samples.

        Raises:
            ValueError: a modality that does not exist, conditions of unequal length, no target.
        """
        targets = [targets] if isinstance(targets, str) else list(targets)
        conditions = {name: _rows(values) for name, values in conditions.items()}
        guided = [{name: _rows(values) for name, values in guide.conditions.items()}
                  for guide in guides]  # fmt: skip
        rows = row_count([conditions, *guided], seeds)
        for what, count in (("num_samples", num_samples), ("batch_size", batch_size)):
            if count < 1:
                raise ValueError(f"{what} must be at least 1, got {count}")
        specs = [self.spec(name, target=True) for name in targets]
        if not specs:
            raise ValueError(f"nothing to generate; choose from {', '.join(self.targets)}")
        seeds = list(range(rows)) if seeds is None else [int(seed) for seed in seeds]
        plan = _Plan(specs=specs, settings=settings or {}, copies=num_samples, chain=chain)
        # What a row is given decides how it is decoded, so it never depends on rows beside it.
        groups = alike([conditions, *guided], rows, max(1, batch_size // num_samples))
        parts = []
        for chosen in groups:
            shown, *others = (
                self.show({n: [values[i] for i in chosen] for n, values in given.items()}, targets)
                for given in (conditions, *guided)
            )
            branches = [Branch(other, guide.weight)
                        for other, guide in zip(others, guides, strict=True)]  # fmt: skip
            parts.append(self._draw(shown, branches, [seeds[i] for i in chosen], plan))
        place = torch.from_numpy(np.concatenate(groups).argsort())
        drawn = {spec.name: _joined([part[spec.name] for part in parts], place) for spec in specs}
        return {
            name: self._generated(spec, drawn[spec.name], num_samples, similarity)
            for name, spec in zip(targets, specs, strict=True)
        }

    def inpaint(
        self, name: str, values: Any, areas: Any, conditions: Mapping[str, Any] | None = None,
        *, paste: bool = True, similarity: Similarity = word_overlap, **options: Any,
    ) -> Generated:  # fmt: skip
        """Draws areas of pictures or maps anew and keeps the rest.

        Tokens that an area touches are generated, under the tokens of the rest and any further
        conditions.

        Args:
            name: Modality of the pictures, such as "rgb".
            values: A picture, or a list of them.
            areas: What is drawn anew: bool over pixels [H, W] or tokens [h, w]; one for all
                pictures, or a list.
            conditions: What the new part is to follow, as for `generate`.
            paste: Whether pixels of kept tokens are those of the original, not of its tokens.
            similarity: As for `generate`.
            **options: Further arguments of `generate`.

        Raises:
            ValueError: an area does not divide into the tokens, and as for `generate`.
        """
        values = _rows(values)
        areas = _rows(areas) if isinstance(areas, list | tuple) else [areas] * len(values)
        if len(areas) != len(values):
            raise ValueError(f"{len(values)} pictures have {len(areas)} areas")
        parts = [Part(value, ~np.asarray(area, bool))
                 for value, area in zip(values, areas, strict=True)]  # fmt: skip
        given = {**(conditions or {}), name: parts}
        found = self.generate(given, [name], similarity=similarity, **options)[name]
        if not paste:
            return found
        spec, samples = self.spec(name, target=True), []
        for group, part in zip(found.samples, parts, strict=True):
            cells = ~given_tokens(spec, part.mask).numpy().reshape(spec.grid, spec.grid)
            samples.append([pasted(made, np.asarray(part.value), cells) for made in group])
        values = [combine(base_name(name), group, similarity) for group in samples]
        return replace(found, samples=samples, values=values)

    def edit_boxes(
        self, pictures: Any, before: Any, after: Any,
        conditions: Mapping[str, Any] | None = None, *, name: str = "rgb", margin: float = 0.0,
        **options: Any,
    ) -> Generated:  # fmt: skip
        """Moves, replaces, removes or adds boxed objects and keeps everything outside their boxes.

        What differs between two sets of boxes is drawn anew, steered by the second: the places
        that objects leave, and those that they come to.

        Args:
            pictures: A picture, or a list of them.
            before: Its boxes, a value of det; or a list.
            after: The boxes that it is to have.
            conditions: What the new part is to follow besides, as for `generate`.
            name: Modality of the pictures.
            margin: Width in 0..1 of the picture by which areas are enlarged.
            **options: Further arguments of `inpaint`.

        Raises:
            ValueError: lists of unequal length, a box beyond the picture, and as for `inpaint`.
        """
        pictures, before, after = _rows(pictures), _rows(before), _rows(after)
        row_count([{name: pictures, "boxes before": before, "boxes after": after}], None)
        side = self.spec(name, target=True).grid
        areas = [box_area(changed_boxes(old, new), side, margin)
                 for old, new in zip(before, after, strict=True)]  # fmt: skip
        return self.inpaint(name, pictures, areas, {**(conditions or {}), "det": after}, **options)

    def upscale(
        self, low: Mapping[str, Generated], conditions: Mapping[str, Any] | None = None,
        targets: Sequence[str] | None = None, *, similarity: Similarity = word_overlap,
        **options: Any,
    ) -> dict[str, Generated]:  # fmt: skip
        """Makes again at a higher resolution what another generator made: 4M's second stage.

        This generator's model reads tokens of the lower resolution and writes those of the higher
        one, of the same base name. Every sample is refined by itself, and what is finished is a
        condition of what follows.

        Args:
            low: What a generator of the lower resolution returned.
            conditions: What was given to it: one value a row, as for `generate`.
            targets: What to refine; by default all of `low` that this model can, in the released
                order.
            similarity: As for `generate`.
            **options: Further arguments of `generate`; seeds are one a sample.

        Raises:
            ValueError: this model refines none of it.
        """
        copies = max(len(group) for found in low.values() for group in found.samples)
        given: dict[str, list[Any]] = {
            name: [value for value in _rows(values) for _ in range(copies)]
            for name, values in (conditions or {}).items()
        }
        able = [name for name in sorted(low, key=_upscale_rank) if name in self.refined]
        targets = able if targets is None else list(targets)
        if not targets or set(targets) - set(able):
            raise ValueError(f"cannot refine {', '.join(targets or low)}; "
                             f"choose from {', '.join(able) or 'nothing'}")  # fmt: skip
        for name, found in low.items():
            if name in self.inputs and self.spec(name, target=False).kind == "seq":
                given[name] = [value for group in found.samples for value in group]
            elif name in self.inputs:
                given[self._token_spec(name).name] = [Tokens(ids) for ids in found.tokens]
        made = self.generate(given, targets, similarity=similarity, **options)
        grouped = {}
        for name, found in made.items():
            samples = [found.values[i : i + copies] for i in range(0, len(found.values), copies)]
            values = [combine(name, group, similarity) for group in samples]
            grouped[name] = replace(found, samples=samples, values=values)
        return grouped

    @property
    def refined(self) -> list[str]:
        """Modalities whose tokens the model reads, and writes at a higher resolution."""
        specs = [spec for spec in self.model.config.modalities if spec.kind == "img"]
        found = []
        for name in sorted({base_name(spec.name) for spec in specs}):
            own = [spec for spec in specs if base_name(spec.name) == name]
            least = min((resolution(spec.name) for spec in own if spec.is_input), default=0)
            if any(spec.is_target and 0 < least < resolution(spec.name) for spec in own):
                found.append(name)
        return found

    def _draw(
        self, shown: dict[str, Shown], branches: Sequence[Branch], seeds: list[int], plan: _Plan
    ) -> dict[str, Drawn]:
        drawn: dict[str, Drawn] = {}
        every, copies = seeds, plan.copies
        for spec in plan.specs:
            others = [branch.without(spec.name) for branch in branches
                      if set(branch.shown) - {spec.name}]  # fmt: skip
            decoding = self._decoding(spec, shown, plan, bool(others))
            salt = zlib.crc32(spec.name.encode()) << 20
            grammar = self._grammar(spec) if decoding.well_formed else None
            with self.precision():
                found = draw(self.model, shown, spec.name, decoding, [s ^ salt for s in every],
                             copies=copies, branches=others, grammar=grammar)  # fmt: skip
            drawn[spec.name] = found
            if plan.chain and spec.is_input and spec is not plan.specs[-1]:
                if copies > 1:
                    index = torch.arange(len(every)).repeat_interleave(copies)
                    index = index.to(self.model.mask_token.device)
                    shown = {k: v.rows(index) for k, v in shown.items()}
                    branches = [branch.rows(index) for branch in branches]
                    every = [s + (copy << 44) for s in every for copy in range(copies)]
                    copies = 1
                shown[spec.name] = as_condition(self.model.config, spec.name, found)
        return drawn

    def _decoding(
        self, spec: ModalitySpec, shown: Iterable[str], plan: _Plan, guides: bool
    ) -> Decoding:
        """The settings of a target: those asked for, or the released sampler's."""
        for name in (spec.name, base_name(spec.name)):
            if name in plan.settings:
                return plan.settings[name]
        # A part of the target itself is what is to be continued, not what it follows.
        found = default_decoding(spec, [name for name in shown if name != spec.name])
        return replace(found, guidance=1.0) if guides else found

    def _grammar(self, spec: ModalitySpec) -> Grammar:
        if spec.name not in self._grammars:
            name = base_name(spec.name)
            form = self.form(name)
            grammar = (form.grammar if form else "") or name
            self._grammars[spec.name] = grammar_for(grammar, self.text, spec.vocab_size)
        return self._grammars[spec.name]

    def precision(self) -> Any:
        """The context in which the network runs: bf16 autocast, or nothing."""
        kind = self.model.mask_token.device.type
        return torch.autocast(kind, torch.bfloat16) if self.bf16 else nullcontext()

    def _generated(
        self, spec: ModalitySpec, drawn: Drawn, copies: int, similarity: Similarity
    ) -> Generated:
        flat = self.values_of(spec, drawn)
        samples = [flat[i : i + copies] for i in range(0, len(flat), copies)]
        values = [combine(base_name(spec.name), group, similarity) for group in samples]
        ids, confidence = drawn.ids.cpu().numpy(), drawn.confidence.float().cpu().numpy()
        return Generated(samples, values, ids, confidence)


def _rows(values: Any) -> list[Any]:
    """A list or tuple, or an array of pictures [N, H, W, C], holds a value a row; anything else
    is one value."""
    several = isinstance(values, list | tuple) or (
        isinstance(values, np.ndarray) and values.ndim == 4
    )
    return list(values) if several else [values]


def _upscale_rank(name: str) -> int:
    return UPSCALE_ORDER.index(name) if name in UPSCALE_ORDER else len(UPSCALE_ORDER)


def _joined(parts: Sequence[Drawn], place: Tensor) -> Drawn:
    """The rows of all parts, the first one from `place[0]` of them and so on, with their copies."""
    def cat(name: str) -> Tensor:
        whole = torch.cat([getattr(part, name) for part in parts])
        return whole.unflatten(0, (len(place), -1))[place.to(whole.device)].flatten(0, 1)

    return Drawn(cat("ids"), cat("confidence"), cat("lengths"))
