"""Tokens from tokens: one decode loop, with order, guidance and schedule as parameters.

R rows (samples), L positions of a modality, K copies of a row (samples drawn from one condition),
V vocabulary. Accepted tokens of a grid become inputs of the next step; sequences are written from
left to right with cached keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from models.fourm.conditions import FIRST, Context, Shown, fill_holes
from models.fourm.grammar import Grammar
from models.fourm.guidance import Branch, Guidance, combined
from models.fourm.model import FourM
from models.fourm.orders import halton_ranks, random_ranks, to_redraw
from models.fourm.sampling import sample, uniform
from models.fourm.schedules import TokenSchedule, temperature_schedule, token_schedule
from models.fourm.spec import EOS_ID, FourMConfig, ModalitySpec

Order = Literal["maskgit", "roar", "halton", "autoregressive"]
ORDERS: tuple[Order, ...] = ("maskgit", "roar", "halton", "autoregressive")

_COPY = 1 << 40  # seeds of further copies lie this far apart


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How one target is decoded. Raises ValueError for an order or a schedule that does not exist
    and for numbers that cannot work."""

    order: Order
    """maskgit accepts the most confident tokens first, roar random ones, halton evenly spread ones
    (see `orders.halton_order`); sequences are autoregressive."""
    steps: int = 1
    """Forward passes for a grid."""
    schedule: TokenSchedule = "cosine"
    """Tokens per step, see `schedules.token_schedule`."""
    temperature: float = 1.0
    """Near 0 takes the most likely token."""
    temperature_schedule: str = "constant"
    """See `schedules.temperature_schedule`."""
    top_k: float = 0
    """Tokens kept, a count or a share of the vocabulary; 0 keeps all."""
    top_p: float = 0.0
    """Probability mass kept; 0 keeps all."""
    guidance: float | Mapping[str, float] = 1.0
    """Scale s of l_u + s (l_c - l_u) over all guided conditions together; or a weight for each
    condition, l_u + sum of w_i (l_i - l_u), where every branch sees that one condition."""
    guided: frozenset[str] | None = None
    """Conditions that a scale acts on; None is all."""
    remask: float = 0.0
    """Share of the tokens of a grid accepted so far that every step but the last hides again, to
    be drawn anew, the less sure ones rather (see `orders.to_redraw`); 0 never goes back."""
    show_opening: bool = False
    """Whether the encoder sees the [S_1] of a sequence that is to be written, as released models
    are sampled; in training it mostly does not."""
    well_formed: bool = False
    """Whether a sequence may only be written as its grammar allows (see `grammar`)."""

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"unknown order {self.order!r}; choose from {', '.join(ORDERS)}")
        if not 0.0 <= self.remask < 1.0:
            raise ValueError(f"remask is a share of tokens in 0..1 without 1, not {self.remask}")
        if self.steps < 1 or self.steps != int(self.steps):
            raise ValueError(f"decoding needs at least 1 step, got {self.steps}")
        if not 0.0 <= self.top_p <= 1.0:
            raise ValueError(f"top_p is a share of probability in 0..1, not {self.top_p}")
        for name in ("temperature", "top_k"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a number from 0 on, not {getattr(self, name)}")
        scales = self.guidance.values() if isinstance(self.guidance, Mapping) else [self.guidance]
        if not all(math.isfinite(scale) for scale in scales):
            raise ValueError(f"guidance must be finite, not {self.guidance}")
        token_schedule(self.schedule, 1, 1)
        temperature_schedule(self.temperature_schedule, 1.0, [1])

    def check(self, spec: ModalitySpec, grammar: Grammar | None) -> None:
        """Raises ValueError where a target cannot be decoded so.

        Args:
            spec: The target.
            grammar: What a sequence may look like; needed for `well_formed`.
        """
        if (spec.kind == "seq") != (self.order == "autoregressive"):
            fitting = "autoregressive" if spec.kind == "seq" else "maskgit, roar or halton"
            raise ValueError(f"{spec.name} cannot be decoded by {self.order}; its order is "
                             f"{fitting}")  # fmt: skip
        if self.well_formed and grammar is None:
            raise ValueError(f"well_formed needs the grammar of {spec.name}")
        if self.well_formed and grammar and grammar.shortest > spec.max_tokens:
            raise ValueError(f"{spec.name} has {spec.max_tokens} tokens, but the shortest "
                             f"well-formed sequence {grammar.shortest}")  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """Decoded tokens of one target.

    `ids` int64 [R * K, L], a row's copies behind one another. Sequences hold what lies between
    [S_1] and [S_2]; `lengths` [R * K] counts it. `confidence` float32 [R * K, L] is the
    probability that the model gave each token.
    """

    ids: Tensor
    confidence: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Step:
    """What an observer of the loop sees: decoded positions [R, M] and logits [R, M, V]."""

    positions: Tensor
    logits: Tensor
    branches: tuple[Tensor, ...] = field(default=())


Observer = Callable[[Step], None]


def draw(
    model: FourM,
    shown: Mapping[str, Shown],
    target: str,
    decoding: Decoding,
    seeds: Sequence[int],
    *,
    copies: int = 1,
    branches: Sequence[Branch] = (),
    grammar: Grammar | None = None,
    ranks: Tensor | None = None,
    observe: Observer | None = None,
) -> Drawn:
    """Decodes one target under conditions.

    Args:
        model: In evaluation mode.
        shown: The conditions. A part of the target itself may be among them: tokens of a grid,
            which are kept, or a text with holes, which are filled; a whole text is kept.
        target: Name of the target modality.
        decoding: Order, schedule and guidance.
        seeds: One a row; a row's tokens depend on its seed alone, not on the batch.
        copies: Samples drawn for each row.
        branches: Further conditions that guide the target, each with a weight of its own.
        grammar: What a sequence may look like; needed for `Decoding.well_formed`.
        ranks: An order of one's own for a grid instead of roar's, [R, L]: lower ranks first.
        observe: Called with the logits of every step.

    Raises:
        ValueError: the target is none of the model's, its kind does not fit the order, or what
            is asked for cannot be done for it.
    """
    spec = model.config.modalities[model.config.index(target)]
    if not spec.is_target:
        raise ValueError(f"{target} is an input of this model and cannot be generated")
    decoding.check(spec, grammar)
    if any(target in branch.shown for branch in branches):
        raise ValueError(f"{target} cannot guide itself")
    guidance = Guidance(scale=decoding.guidance, guided=decoding.guided, branches=branches)
    run = _Run(model, spec, decoding, grammar if decoding.well_formed else None, observe)
    with torch.inference_mode():
        if spec.kind == "seq":
            return run.write(dict(shown), guidance, seeds, copies)
        return run.paint(dict(shown), guidance, seeds, copies, ranks)


def _copied(seeds: Sequence[int], copies: int) -> list[int]:
    return [seed + copy * _COPY for seed in seeds for copy in range(copies)]


@dataclass(frozen=True)
class _Run:
    """One call of `draw`: the loop over steps, and what its steps share."""

    model: FourM
    spec: ModalitySpec
    decoding: Decoding
    grammar: Grammar | None
    observe: Observer | None

    def paint(
        self, shown: dict[str, Shown], guidance: Guidance, seeds: Sequence[int], copies: int,
        ranks: Tensor | None,
    ) -> Drawn:  # fmt: skip
        """Decodes a grid. Rows that miss equally many tokens share their schedule and run
        together, so that shapes are static."""
        name, device = self.spec.name, self.model.mask_token.device
        if name not in shown:
            empty = torch.zeros(len(seeds), self.spec.max_tokens, dtype=torch.long, device=device)
            shown[name] = Shown(empty, empty.bool())
        if ranks is None and self.decoding.order == "roar":
            ranks = random_ranks(seeds, self.spec.max_tokens)
        elif ranks is None:
            ranks = halton_ranks(self.spec).expand(len(seeds), -1)
        missing = (~shown[name].visible).sum(1)
        ids = shown[name].values.repeat_interleave(copies, 0)
        confidence = torch.ones(ids.shape, device=device)
        for count in sorted(set(missing.tolist()) - {0}):
            index = (missing == count).nonzero().squeeze(1)
            some = {key: part.rows(index) for key, part in shown.items()}
            own = [seeds[row] for row in index.tolist()]
            rank = ranks.to(device)[index]
            found = self._paint(some, guidance.rows(index), own, copies, rank, count)
            every = (index.unsqueeze(1) * copies + torch.arange(copies, device=device)).flatten()
            ids[every], confidence[every] = found
        return Drawn(ids, confidence, missing.new_full((len(ids),), self.spec.max_tokens))

    def _paint(
        self, shown: dict[str, Shown], guidance: Guidance, seeds: list[int], copies: int,
        rank: Tensor, missing: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        name, rows, decoding = self.spec.name, len(seeds), self.decoding
        part = missing < self.spec.max_tokens
        counts = token_schedule(decoding.schedule, decoding.steps, missing, fewer=part)
        heats = temperature_schedule(decoding.temperature_schedule, decoding.temperature, counts)
        every, confidence = _copied(seeds, copies), rank.new_ones(rows * copies, rank.shape[1])
        fixed, again, expanded = shown[name].visible, 0, copies == 1
        for step, (count, heat) in enumerate(zip(counts, heats, strict=True)):
            count += again
            if not count:
                continue
            places = self._next(shown[name], rank, count)
            logits = self._grid_logits(shown, guidance, places)
            if not expanded:
                # The first step of all copies of a row is one forward pass.
                expanded = True
                index = torch.arange(rows, device=rank.device).repeat_interleave(copies)
                shown = {key: value.rows(index) for key, value in shown.items()}
                logits, places, rank, fixed = (x[index] for x in (logits, places, rank, fixed))
                guidance = guidance.rows(index)
            shown[name] = self._accept(shown[name], logits, places, every, step, heat, count,
                                       confidence)  # fmt: skip
            if decoding.remask and step + 1 < len(counts):
                shown[name], again = self._go_back(shown[name], fixed, confidence, every, step)
            else:
                again = 0
        return shown[name].values, confidence

    def _go_back(
        self, part: Shown, fixed: Tensor, confidence: Tensor, seeds: list[int], step: int
    ) -> tuple[Shown, int]:
        """Hides a share of the accepted tokens again; how many."""
        free = part.visible & ~fixed
        count = int(self.decoding.remask * int(free[0].sum()))
        places = to_redraw(seeds, step, confidence, free, count)
        return Shown(part.values, part.visible.scatter(1, places, False)), count

    def _next(self, part: Shown, rank: Tensor, count: int) -> Tensor:
        """Positions [R, M] of a grid that a step decodes, ascending: the first `count` of an
        order, or all that are missing, for maskgit to choose from."""
        if self.decoding.order == "maskgit":
            count = int((~part.visible[0]).sum())
        return (rank + part.visible * 2.0).topk(count, dim=1, largest=False).indices.sort(1).values

    def _accept(
        self, part: Shown, logits: Tensor, places: Tensor, seeds: list[int], step: int,
        heat: float, count: int, confidence: Tensor,
    ) -> Shown:  # fmt: skip
        """Draws tokens and shows the `count` surest; notes their confidence in place."""
        noise = uniform(seeds, step, confidence.shape[1]).to(places.device).gather(1, places)
        ids, sure = sample(logits, noise, heat, self.decoding.top_k, self.decoding.top_p)
        if places.shape[1] > count:
            best = sure.topk(count, dim=1).indices
            places, ids, sure = (x.gather(1, best) for x in (places, ids, sure))
        confidence.scatter_(1, places, sure)
        return Shown(part.values.scatter(1, places, ids), part.visible.scatter(1, places, True))

    def _grid_logits(
        self, shown: Mapping[str, Shown], guidance: Guidance, places: Tensor
    ) -> Tensor:
        """Guided logits [R, M, V] of the grid positions `places` [R, M]."""
        inputs, weights = guidance.inputs(self.model.config, shown, self.spec.name)
        context = Context.read(self.model, inputs, len(weights) + 1)
        return self._logits(context, torch.zeros_like(places), places, weights, places)

    def _logits(
        self, context: Context, fed: Tensor, position: Tensor, weights: tuple[float, ...],
        places: Tensor,
    ) -> Tensor:  # fmt: skip
        """Guided logits [R, M, V] out of the decoder's slots [R, M], `places` for an observer."""
        modality = torch.full_like(position, self.model.config.index(self.spec.name))
        y = self.model.decode(context.encoded, fed, modality, position, None, context.caches)
        # Logits are linear in what they are made of, so guidance needs those of one row only.
        guided = self.model.logits(combined(y.float(), weights).to(y.dtype), self.spec).float()
        if self.observe:
            logits = self.model.logits(y, self.spec).float()
            self.observe(Step(places, guided, logits.chunk(len(weights) + 1)))
        return guided

    def write(
        self, shown: dict[str, Shown], guidance: Guidance, seeds: Sequence[int], copies: int
    ) -> Drawn:
        """Decodes a sequence, or the holes of one."""
        spec, device = self.spec, self.model.mask_token.device
        given = shown.get(spec.name)
        holes = given.holes if given else torch.zeros(len(seeds))
        every = torch.arange(len(seeds), device=device).repeat_interleave(copies)
        if given is not None and bool((given.visible.any(1) & (holes == 0)).all()):
            return _filled(given.rows(every), None, spec.max_tokens)
        # A hole alone is a text of which nothing is known.
        if given is None or not bool((holes * (given.visible.sum(1) > 1)).any()):
            given, opened = None, torch.full((len(seeds), 1), FIRST, device=device)
            if spec.is_input or not shown:
                seen = torch.full_like(opened, self.decoding.show_opening).bool()
                shown[spec.name] = Shown(opened, seen)
            holes = torch.ones_like(opened[:, 0])
        elif self.grammar or not bool(holes.all()):
            raise ValueError(f"{spec.name}: to fill holes, every row needs one, and no grammar")
        inputs, weights = guidance.inputs(self.model.config, shown, spec.name)
        context = Context.read(self.model, inputs, len(weights) + 1)
        if copies > 1:
            context.pick(every)
        closing = (FIRST + holes).repeat_interleave(copies)
        drawn = self._write(context, weights, closing, _copied(seeds, copies))
        if given is None:
            return drawn
        return _filled(given.rows(every), drawn, spec.max_tokens)

    def _write(
        self, context: Context, weights: tuple[float, ...], closing: Tensor, seeds: list[int]
    ) -> Drawn:
        """The loop of a sequence, row by row until its `closing` id [R * K]."""
        spec, decoding, device, total = self.spec, self.decoding, closing.device, len(seeds)
        ids = torch.zeros(total, spec.max_tokens, dtype=torch.long, device=device)
        sure = torch.zeros(total, spec.max_tokens, device=device)
        lengths = torch.full((total,), spec.max_tokens, dtype=torch.long, device=device)
        noise = uniform(seeds, 0, spec.max_tokens).to(device)
        active, fed = torch.arange(total, device=device), torch.full_like(closing, FIRST)
        state = self.grammar.start(total, device) if self.grammar else None
        for step in range(spec.max_tokens):
            entry = fed.unsqueeze(1)
            place = torch.full_like(entry, step if step < spec.position_limit else 0)
            guided = self._logits(context, entry, place, weights,
                                  torch.full_like(fed, step).unsqueeze(1))[:, 0]  # fmt: skip
            legal = guided
            if self.grammar and state is not None:
                allowed = self.grammar.allowed(state, spec.max_tokens - step)
                legal = guided.masked_fill(~allowed, -torch.inf)
            fed, _ = sample(legal, noise[active, step], decoding.temperature, decoding.top_k,
                            decoding.top_p)  # fmt: skip
            ended = fed == closing[active]
            lengths[active[ended]] = step
            ids[active, step] = torch.where(ended, 0, fed)
            sure[active, step] = guided.softmax(-1).gather(1, fed.unsqueeze(1)).squeeze(1)
            if self.grammar and state is not None:
                state = self.grammar.advance(state, fed)
            if bool(ended.any()):
                # Finished rows leave the batch at once.
                kept = (~ended).nonzero().squeeze(1)
                if not len(kept):
                    break
                context.pick(kept)
                active, fed, state = active[kept], fed[kept], state and state.rows(kept)
        return Drawn(ids, sure, lengths)


def _filled(given: Shown, drawn: Drawn | None, limit: int) -> Drawn:
    """A text with what was drawn in the place of its holes; without holes, the text itself."""
    if drawn is None:
        nothing = torch.zeros_like(given.values[:, :0])
        drawn = Drawn(nothing, nothing.float(), nothing.sum(1))
    place = torch.arange(drawn.ids.shape[1], device=drawn.ids.device)
    runs = Shown(drawn.ids, place < drawn.lengths.unsqueeze(1))
    whole, sure = fill_holes(given, runs, drawn.confidence, limit)
    return Drawn(whole.values, sure, whole.visible.sum(1))


def as_condition(config: FourMConfig, target: str, drawn: Drawn) -> Shown:
    """Decoded tokens as a condition of further targets: grids whole, texts through [EOS]."""
    if config.by_name[target].kind != "seq":
        return Shown(drawn.ids, torch.ones_like(drawn.ids, dtype=torch.bool))
    place = torch.arange(drawn.ids.shape[1], device=drawn.ids.device)
    inside = place < drawn.lengths.unsqueeze(1)
    ended = ((drawn.ids == EOS_ID) & inside).cumsum(1) - ((drawn.ids == EOS_ID) & inside).int()
    return Shown(drawn.ids, inside & (ended == 0))
