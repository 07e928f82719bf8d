"""Values sampled from a trained 4M: what is asked is checked, then drawn batch by batch."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from infra.machine import fast_bf16
from models.fourm.decoding import Decoding, Drawn, as_condition, draw
from models.fourm.ensemble import Similarity, combine, word_overlap
from models.fourm.grammar import Grammar, grammar_for
from models.fourm.guidance import Branch
from models.fourm.model import FourM
from models.fourm.presets import base_name, default_decoding
from models.fourm.spec import ModalitySpec
from models.fourm.values import Translator, alike, row_count

if TYPE_CHECKING:
    from tokenizers_vq.sequences.form import TextForm
    from tokenizers_vq.text import TextTokenizer
    from tokenizers_vq.tokenizer import Tokenizer

Given = Mapping[str, Sequence[Any]]
"""Values a modality, one a row; None where a row lacks it."""


@dataclass(frozen=True)
class Guide:
    """Conditions that pull a result towards them, or push it away, with a weight of their own.

    Every step adds weight * (l_i - l) to the logits l under the plain conditions, l_i being those
    under the guide's conditions as well. Guides take the place of a guidance scale. None guides
    the generation of its own modality.

    Attributes:
        conditions: As for `Sampler.generate`.
        weight: Negative to lead away.

    Raises:
        ValueError: no conditions, or a weight that is no finite number.
    """

    conditions: Mapping[str, Any]
    weight: float

    def __post_init__(self) -> None:
        if not self.conditions or not math.isfinite(self.weight):
            raise ValueError(f"a guide needs conditions and a finite weight, not "
                             f"{sorted(self.conditions)} and {self.weight}")


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

    given: Given
    guides: Sequence[tuple[Given, float]]
    specs: Sequence[ModalitySpec]
    settings: Mapping[str, Decoding]
    copies: int
    chain: bool


class Sampler(Translator):
    """A trained model together with what turns its tokens into values.

    Args:
        model: The network; put in evaluation mode.
        tokenizers: A tokenizer for each modality of grids and for each text that holds codes, by
            catalogue name.
        text: The tokenizer of all sequences.
        bf16: Whether to run in bf16, in which a row's result may depend on how many rows there are;
            None does so on devices that are fast at it.
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
        self.bf16 = bf16
        self._grammars: dict[str, Grammar] = {}

    def to(self, device: str | torch.device) -> Self:
        """Moves the network and its tokenizers; returns itself."""
        self.model.to(device)
        for tokenizer in self.tokenizers.values():
            tokenizer.to(device)
        return self

    def generate(
        self, conditions: Mapping[str, Any], targets: Sequence[str], *,
        guides: Sequence[Guide] = (), settings: Mapping[str, Decoding] | None = None,
        num_samples: int = 1, seeds: Sequence[int] | None = None, chain: bool = True,
        batch_size: int = 64, similarity: Similarity = word_overlap,
    ) -> dict[str, Generated]:  # fmt: skip
        """Generates targets from conditions.

        Args:
            conditions: A value a modality, or a list of values, one a row; None where a row lacks
                it. A `Part` gives some tokens only: of a target itself, they are kept and the
                rest is generated. A target that is given whole stays as it is.
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
            ValueError: a modality that does not exist, conditions of unequal length, no target,
                or settings that do not fit; before anything is drawn.
        """
        names = [targets] if isinstance(targets, str) else list(targets)
        given = [_by_row(conditions), *(_by_row(guide.conditions) for guide in guides)]
        rows = row_count(given, seeds)
        _at_least_one(num_samples=num_samples, batch_size=batch_size)
        own = list(range(rows)) if seeds is None else [int(seed) for seed in seeds]
        weights = [guide.weight for guide in guides]
        plan = self._plan(names, given, weights, settings or {}, num_samples, chain)
        # What a row is given decides how it is decoded, so it never depends on rows beside it.
        groups = alike(given, rows, max(1, batch_size // num_samples))
        parts = [self._draw(plan, names, chosen, [own[i] for i in chosen]) for chosen in groups]
        place = torch.from_numpy(np.concatenate(groups).argsort())
        drawn = (_joined([part[spec.name] for part in parts], place) for spec in plan.specs)
        return {name: self._generated(spec, each, num_samples, similarity)
                for name, spec, each in zip(names, plan.specs, drawn, strict=True)}  # fmt: skip

    def _plan(
        self, targets: Sequence[str], every: Sequence[Given], weights: Sequence[float],
        settings: Mapping[str, Decoding], copies: int, chain: bool,
    ) -> _Plan:  # fmt: skip
        given, *guides = every
        specs = [self.spec(name, target=True) for name in targets]
        if not specs:
            raise ValueError(f"nothing to generate; choose from {', '.join(self.targets)}")
        # A modality's own name counts more than its name in the catalogue.
        order = sorted(settings, key=lambda name: name in self.model.config.by_name)
        chosen = {self.spec(name, target=True).name: settings[name] for name in order}
        for spec in specs:
            self._check_target(spec)
            if spec.name in chosen:
                others = [other.name for other in specs if other is not spec]
                self._check_decoding(spec, chosen[spec.name], [*given, *others])
        weighted = list(zip(guides, weights, strict=True))
        return _Plan(given=given, guides=weighted, specs=specs, settings=chosen, copies=copies,
                     chain=chain)  # fmt: skip

    def _check_target(self, spec: ModalitySpec) -> None:
        """Raises ValueError where the tokens of a target could not be turned into values."""
        form = self.form(base_name(spec.name))
        if spec.kind != "seq" or (form is not None and form.parts is not None):
            self._tokenizer(spec)

    def _check_decoding(
        self, spec: ModalitySpec, decoding: Decoding, known: Sequence[str]
    ) -> None:
        """Raises ValueError for settings that do not fit a target, or name what is no condition."""
        decoding.check(spec, self._grammar(spec) if decoding.well_formed else None)
        scales = decoding.guidance if isinstance(decoding.guidance, Mapping) else {}
        conditions = sorted({base_name(name) for name in known})
        for name in (*scales, *(decoding.guided or ())):
            if base_name(name) not in conditions:
                raise ValueError(f"{spec.name} is guided by {name!r}, but the conditions are "
                                 f"{', '.join(conditions) or 'none'}")

    def _draw(
        self, plan: _Plan, targets: Sequence[str], chosen: Sequence[int], seeds: list[int]
    ) -> dict[str, Drawn]:
        """All targets of the rows `chosen`, which are given the same in the same form."""
        shown, *others = (
            self.show({name: [values[i] for i in chosen] for name, values in part.items()}, targets)
            for part in (plan.given, *(part for part, _ in plan.guides))
        )
        branches = [Branch(other, weight)
                    for other, (_, weight) in zip(others, plan.guides, strict=True)]  # fmt: skip
        drawn: dict[str, Drawn] = {}
        every, copies, device = seeds, plan.copies, self.model.mask_token.device
        for spec in plan.specs:
            guides = [branch.without(spec.name) for branch in branches
                      if set(branch.shown) - {spec.name}]  # fmt: skip
            decoding = self._decoding(spec, shown, plan, bool(guides))
            salt = zlib.crc32(spec.name.encode()) << 20
            grammar = self._grammar(spec) if decoding.well_formed else None
            with self.precision():
                found = draw(self.model, shown, spec.name, decoding, [s ^ salt for s in every],
                             copies=copies, branches=guides, grammar=grammar)  # fmt: skip
            drawn[spec.name] = found
            if not plan.chain or not spec.is_input or spec is plan.specs[-1]:
                continue
            if copies > 1:
                index = torch.arange(len(every), device=device).repeat_interleave(copies)
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
        if spec.name in plan.settings:
            return _for_these(plan.settings[spec.name], list(shown))
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
        bf16 = fast_bf16(kind) if self.bf16 is None else self.bf16
        return torch.autocast(kind, torch.bfloat16) if bf16 else nullcontext()

    def _generated(
        self, spec: ModalitySpec, drawn: Drawn, copies: int, similarity: Similarity
    ) -> Generated:
        flat = self.values_of(spec, drawn)
        samples = [flat[i : i + copies] for i in range(0, len(flat), copies)]
        values = [combine(base_name(spec.name), group, similarity) for group in samples]
        ids, confidence = drawn.ids.cpu().numpy(), drawn.confidence.float().cpu().numpy()
        return Generated(samples, values, ids, confidence)


def by_rows(values: Any) -> list[Any]:
    """A list or tuple, or an array of pictures [N, H, W, C], holds a value a row; anything else
    is one value."""
    several = isinstance(values, list | tuple) or (
        isinstance(values, np.ndarray) and values.ndim == 4
    )
    return list(values) if several else [values]


def _at_least_one(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def _by_row(conditions: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: by_rows(values) for name, values in conditions.items()}


def _for_these(decoding: Decoding, shown: Sequence[str]) -> Decoding:
    """Settings whose guidance names conditions as the model does, and only those shown: rows may
    lack others."""
    scale, guided = decoding.guidance, decoding.guided
    if isinstance(scale, Mapping):
        scale = {name: scale[key] for name in shown for key in (name, base_name(name))
                 if key in scale and (key == name or name not in scale)}  # fmt: skip
    if guided is not None:
        guided = frozenset(name for name in shown if {name, base_name(name)} & guided)
    return replace(decoding, guidance=scale, guided=guided)


def _joined(parts: Sequence[Drawn], place: Tensor) -> Drawn:
    """The rows of all parts, the first one from `place[0]` of them and so on, with their copies."""
    def cat(name: str) -> Tensor:
        whole = torch.cat([getattr(part, name) for part in parts])
        return whole.unflatten(0, (len(place), -1))[place.to(whole.device)].flatten(0, 1)

    return Drawn(cat("ids"), cat("confidence"), cat("lengths"))
