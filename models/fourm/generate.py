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

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from models.fourm.editing import box_area, changed_boxes, pasted
from models.fourm.ensemble import Similarity, combine, word_overlap
from models.fourm.presets import UPSCALE_ORDER, base_name, resolution
from models.fourm.sampler import Generated, Guide, Sampler, by_rows
from models.fourm.values import Part, Tokens, given_tokens, read_boxes, row_count

__all__ = ["Generated", "Generator", "Guide", "Part", "Tokens", "base_name", "read_boxes"]


class Generator(Sampler):
    """A `Sampler` that also draws parts of pictures anew and makes results again, finer."""

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
        values = by_rows(values)
        areas = by_rows(areas) if isinstance(areas, list | tuple) else [areas] * len(values)
        if len(areas) != len(values):
            raise ValueError(f"{len(values)} pictures have {len(areas)} areas")
        if paste:
            _check_pixels(name, values)
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
        pictures, before, after = by_rows(pictures), by_rows(before), by_rows(after)
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
        if not low:
            choices = ", ".join(self.refined) or "nothing"
            raise ValueError(f"nothing to refine; choose from {choices}")
        copies = max(len(group) for found in low.values() for group in found.samples)
        able = [name for name in sorted(low, key=_upscale_rank) if name in self.refined]
        targets = able if targets is None else list(targets)
        if not targets or set(targets) - set(able):
            raise ValueError(f"cannot refine {', '.join(targets or low)}; "
                             f"choose from {', '.join(able) or 'nothing'}")  # fmt: skip
        given = self._shown_again(low, conditions or {}, copies)
        made = self.generate(given, targets, similarity=similarity, **options)
        grouped = {}
        for name, found in made.items():
            samples = [found.values[i : i + copies] for i in range(0, len(found.values), copies)]
            values = [combine(name, group, similarity) for group in samples]
            grouped[name] = replace(found, samples=samples, values=values)
        return grouped

    def _shown_again(
        self, low: Mapping[str, Generated], conditions: Mapping[str, Any], copies: int
    ) -> dict[str, list[Any]]:
        """Conditions of every sample: what it was made from, and what was made."""
        given: dict[str, list[Any]] = {
            name: [value for value in by_rows(values) for _ in range(copies)]
            for name, values in conditions.items()
        }
        for name, found in low.items():
            if name in self.inputs and self.spec(name, target=False).kind == "seq":
                given[name] = [value for group in found.samples for value in group]
            elif name in self.inputs:
                given[self._token_spec(name).name] = [Tokens(ids) for ids in found.tokens]
        return given

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


def _check_pixels(name: str, values: Sequence[Any]) -> None:
    if any(isinstance(value, Tokens) for value in values):
        raise ValueError(f"{name} is given as tokens, which have no pixels to paste: set "
                         "paste=False")


def _upscale_rank(name: str) -> int:
    return UPSCALE_ORDER.index(name) if name in UPSCALE_ORDER else len(UPSCALE_ORDER)
