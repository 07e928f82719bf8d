"""Tokens from tokens: one decode loop, with order, guidance and schedule as parameters.

R rows (samples), L positions of a modality, N encoder slots, K copies of a row (samples drawn from
one condition), V vocabulary. Accepted tokens of a grid become inputs of the next step; sequences
are written from left to right with cached keys and values. The encoder reads each set of
conditions once, whatever the number of copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor

from models.fourm.batch import Batch, Dense
from models.fourm.model import DecoderBlock, Encoded, FourM, LayerCache
from models.fourm.sampling import sample, uniform
from models.fourm.schedules import TokenSchedule, temperature_schedule, token_schedule
from models.fourm.spec import EOS_ID, SENTINEL_0, FourMConfig, ModalitySpec

Order = Literal["maskgit", "roar", "autoregressive"]
ORDERS: tuple[Order, ...] = ("maskgit", "roar", "autoregressive")
FIRST, LAST = SENTINEL_0 + 1, SENTINEL_0 + 2
"""[S_1] opens a wholly masked sequence, [S_2] closes it."""

_COPY = 1 << 40  # seeds of further copies lie this far apart
_ORDER_STREAM = -1


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How one target is decoded. Raises ValueError for an order that does not exist."""

    order: Order
    """maskgit accepts the most confident tokens first, roar random ones; sequences are
    autoregressive."""
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
    show_opening: bool = False
    """Whether the encoder sees the [S_1] of a sequence that is to be written, as released models
    are sampled; in training it mostly does not."""

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"unknown order {self.order!r}; choose from {', '.join(ORDERS)}")


def default_decoding(spec: ModalitySpec, given: Sequence[str]) -> Decoding:
    """The released sampler's settings for a target, given the names of its conditions."""
    if spec.kind == "seq":
        temperature = 0.3 if spec.name in ("caption", "det") else 0.1
        return Decoding(
            order="autoregressive", temperature=temperature, top_p=0.8, show_opening=True
        )
    if any(name.split("@")[0] in ("rgb", "tok_rgb") for name in given):
        return Decoding(order="roar", steps=1, temperature=0.01, top_p=0.8, guidance=2.0)
    steps = 25 if spec.name.startswith("tok_rgb") else 8
    return Decoding(
        order="roar", steps=min(steps, spec.max_tokens), schedule="linear", temperature=3.0,
        temperature_schedule="onex:0.5:0.5", top_p=0.8, guidance=2.0,
    )  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """What the encoder sees of one modality.

    `values` are ids int64 [R, L], or vectors [R, L, C]; `visible` is bool [R, L].
    """

    values: Tensor
    visible: Tensor

    def rows(self, index: Tensor) -> Shown:
        """The rows picked by `index`."""
        return Shown(self.values[index], self.visible[index])


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


def gather_inputs(config: FourMConfig, shown: Mapping[str, Shown]) -> Batch:
    """The encoder half of a batch: visible positions of every modality, packed to the left."""
    ids, mods, positions, visible, source = [], [], [], [], []
    for name in sorted(shown):
        spec, part = config.by_name[name], shown[name]
        rows, length = part.visible.shape
        place = torch.arange(length, device=part.visible.device).expand(rows, length)
        counted = (part.visible.cumsum(1) - 1).clamp_(min=0)
        ids.append(part.values if spec.discrete else torch.zeros_like(place))
        mods.append(torch.full_like(place, config.index(name)))
        positions.append(place if spec.kind in ("img", "pixels") else counted)
        visible.append(part.visible)
        source.append(place)
    mask = torch.cat(visible, 1)
    # At least one slot, used or not: attention over none is undefined.
    slots = max(1, int(mask.sum(1).max()))
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)[:, :slots]
    used = mask.gather(1, order)
    id_, mod, pos, src = (torch.cat(p, 1).gather(1, order) for p in (ids, mods, positions, source))
    mod = torch.where(used, mod, -1)
    dense = {}
    for name, part in shown.items():
        if not config.by_name[name].discrete:
            row, slot = (mod == config.index(name)).nonzero(as_tuple=True)
            dense[name] = Dense(part.values[row, src[row, slot]], row * mod.shape[1] + slot)
    none = mod.new_zeros((len(mod), 0))
    return Batch(torch.where(used, id_, 0), mod, torch.where(used, pos, 0), none, none, none, none,
                 none[0], none[0], (), dense)  # fmt: skip


def _hidden(spec: ModalitySpec, part: Shown, absent: bool) -> Shown:
    """A condition as the unconditional branch sees it: nothing, or a sequence wholly masked."""
    visible = torch.zeros_like(part.visible)
    if absent or spec.kind in ("img", "pixels"):
        return Shown(part.values, visible)
    visible[:, 0] = True
    values = part.values.clone()
    values[:, 0] = FIRST if spec.kind == "seq" else 0
    return Shown(values, visible)


def _branches(
    config: FourMConfig, shown: Mapping[str, Shown], target: str, decoding: Decoding
) -> tuple[dict[str, Shown], tuple[float, ...]]:
    """The inputs of all branches below one another, unconditional first, and their weights."""
    if not config.by_name[target].is_input and len(shown) > 1:
        shown = {name: part for name, part in shown.items() if name != target}
    conditions = set(shown) - {target}
    weights = decoding.guidance
    if isinstance(weights, Mapping):
        unknown = sorted(set(weights) - conditions)
        if unknown:
            raise ValueError(f"guided by {unknown[0]}, but the conditions are {sorted(conditions)}")
        hidden = [set(weights)] + [set(weights) - {name} for name in weights]
        absent, scales = True, tuple(weights.values())
    else:
        guided = conditions if decoding.guided is None else conditions & decoding.guided
        if weights == 1.0 or not guided:
            return dict(shown), ()
        hidden, absent, scales = [guided, set()], False, (float(weights),)
    parts = {
        name: [_hidden(config.by_name[name], part, absent) if name in out else part
               for out in hidden]
        for name, part in shown.items()
    }  # fmt: skip
    stacked = {
        name: Shown(torch.cat([p.values for p in part]), torch.cat([p.visible for p in part]))
        for name, part in parts.items()
    }
    return stacked, scales


def _combined(logits: Tensor, weights: tuple[float, ...]) -> Tensor:
    if not weights:
        return logits
    base, *others = logits.chunk(len(weights) + 1)
    pairs = zip(weights, others, strict=True)
    return torch.add(base, sum(weight * (other - base) for weight, other in pairs))


@dataclass
class Context:
    """The encoder's output as the decoder's layers read it."""

    encoded: Encoded
    caches: list[LayerCache]

    @classmethod
    def read(cls, model: FourM, shown: Mapping[str, Shown]) -> Context:
        """Runs the encoder, and the decoder's key and value projections of its output."""
        batch = gather_inputs(model.config, shown)
        encoded = model.encode(batch)
        seen = (batch.enc_mod >= 0).any(1)
        if model.register_tokens is not None:
            seen = torch.ones_like(seen)
        caches = []
        for layer in model.decoder:
            block = cast(DecoderBlock, layer)
            keys, values = block.cross_attn.keys(block.context_norm(encoded.context))
            # A row without any input takes nothing from cross-attention.
            values = values * seen.view(-1, 1, 1, 1)
            caches.append(LayerCache(cross_kv=(keys, values)))
        return cls(encoded, caches)

    def pick(self, index: Tensor) -> None:
        """Keeps (or repeats) the rows of `index`."""
        def chosen(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
            return pair and (pair[0][index], pair[1][index])

        self.encoded = Encoded(self.encoded.context, self.encoded.mask[index])
        self.caches = [LayerCache(chosen(c.self_kv), chosen(c.cross_kv)) for c in self.caches]


def draw(
    model: FourM,
    shown: Mapping[str, Shown],
    target: str,
    decoding: Decoding,
    seeds: Sequence[int],
    *,
    copies: int = 1,
    observe: Observer | None = None,
) -> Drawn:
    """Decodes one target under conditions.

    Args:
        model: In evaluation mode.
        shown: The conditions; a part of the target itself may be among them.
        target: Name of the target modality.
        decoding: Order, schedule and guidance.
        seeds: One a row; a row's tokens depend on its seed alone, not on the batch.
        copies: Samples drawn for each row.
        observe: Called with the logits of every step.

    Raises:
        ValueError: the target is none of the model's, or its kind does not fit the order.
    """
    spec = model.config.modalities[model.config.index(target)]
    if not spec.is_target:
        raise ValueError(f"{target} is an input of this model and cannot be generated")
    if (spec.kind == "seq") != (decoding.order == "autoregressive"):
        fitting = "autoregressive" if spec.kind == "seq" else "maskgit or roar"
        raise ValueError(f"{target} cannot be decoded by {decoding.order}; its order is {fitting}")
    loop = _draw_sequence if spec.kind == "seq" else _draw_grid
    with torch.inference_mode():
        return loop(model, dict(shown), spec, decoding, seeds, copies, observe)


def _copied(seeds: Sequence[int], copies: int) -> list[int]:
    return [seed + copy * _COPY for seed in seeds for copy in range(copies)]


def _draw_grid(
    model: FourM, shown: dict[str, Shown], spec: ModalitySpec, decoding: Decoding,
    seeds: Sequence[int], copies: int, observe: Observer | None,
) -> Drawn:  # fmt: skip
    device, rows, length = model.mask_token.device, len(seeds), spec.max_tokens
    if spec.name not in shown:
        empty = torch.zeros(rows, length, dtype=torch.long, device=device)
        shown[spec.name] = Shown(empty, empty.bool())
    known = shown[spec.name].visible
    missing = length - known.sum(1)
    if int(missing.min()) != int(missing.max()):
        raise ValueError(f"{spec.name}: every row must miss the same number of tokens")
    if not int(missing[0]):
        ids = shown[spec.name].values.repeat_interleave(copies, 0)
        lengths = missing.new_full((len(ids),), length)
        return Drawn(ids, torch.ones(ids.shape, device=device), lengths)
    counts = token_schedule(decoding.schedule, decoding.steps, int(missing[0]))
    heats = temperature_schedule(decoding.temperature_schedule, decoding.temperature, counts)
    # One random order for all copies of a row: their first step is then one forward pass.
    order = uniform(seeds, _ORDER_STREAM, length).to(device)
    every, confidence = _copied(seeds, copies), torch.ones(rows * copies, length, device=device)
    expanded = copies == 1
    for step, (count, heat) in enumerate(zip(counts, heats, strict=True)):
        if not count:
            continue
        part = shown[spec.name]
        rank = order if decoding.order == "roar" else torch.arange(length, device=device) / length
        width = count if decoding.order == "roar" else int((~part.visible[0]).sum())
        places = (rank + part.visible * 2.0).topk(width, dim=1, largest=False).indices
        places = places.sort(1).values
        logits = _grid_logits(model, shown, spec, decoding, places, observe)
        if not expanded:
            expanded, index = True, torch.arange(rows, device=device).repeat_interleave(copies)
            shown = {name: value.rows(index) for name, value in shown.items()}
            logits, places, order = logits[index], places[index], order[index]
        noise = uniform(every, step, length).to(device).gather(1, places)
        ids, sure = sample(logits, noise, heat, decoding.top_k, decoding.top_p)
        if width > count:
            best = sure.topk(count, dim=1).indices
            places, ids, sure = (x.gather(1, best) for x in (places, ids, sure))
        part = shown[spec.name]
        shown[spec.name] = Shown(
            part.values.scatter(1, places, ids), part.visible.scatter(1, places, True)
        )
        confidence.scatter_(1, places, sure)
    ids = shown[spec.name].values
    return Drawn(ids, confidence, missing.new_full((len(ids),), length))


def _grid_logits(
    model: FourM, shown: dict[str, Shown], spec: ModalitySpec, decoding: Decoding,
    places: Tensor, observe: Observer | None,
) -> Tensor:  # fmt: skip
    """Guided logits [R, M, V] of the grid positions `places` [R, M]."""
    inputs, weights = _branches(model.config, shown, spec.name, decoding)
    context = Context.read(model, inputs)
    position = places.repeat(len(weights) + 1, 1)
    modality = torch.full_like(position, model.config.index(spec.name))
    y = model.decode(context.encoded, torch.zeros_like(position), modality, position, None,
                     context.caches)  # fmt: skip
    logits = model.logits(y, spec).float()
    guided = _combined(logits, weights)
    if observe:
        observe(Step(places, guided, logits.chunk(len(weights) + 1)))
    return guided


def _draw_sequence(
    model: FourM, shown: dict[str, Shown], spec: ModalitySpec, decoding: Decoding,
    seeds: Sequence[int], copies: int, observe: Observer | None,
) -> Drawn:  # fmt: skip
    device, total = model.mask_token.device, len(seeds) * copies
    opened = torch.full((len(seeds), 1), FIRST, dtype=torch.long, device=device)
    if spec.is_input or not shown:
        shown[spec.name] = Shown(opened, torch.full_like(opened, decoding.show_opening).bool())
    inputs, weights = _branches(model.config, shown, spec.name, decoding)
    context = Context.read(model, inputs)
    branches = len(weights) + 1
    if copies > 1:
        context.pick(torch.arange(branches * len(seeds), device=device).repeat_interleave(copies))
    ids = torch.zeros(total, spec.max_tokens, dtype=torch.long, device=device)
    sure = torch.zeros(total, spec.max_tokens, device=device)
    lengths = torch.full((total,), spec.max_tokens, dtype=torch.long, device=device)
    noise = uniform(_copied(seeds, copies), 0, spec.max_tokens).to(device)
    active = torch.arange(total, device=device)
    fed = torch.full((total,), FIRST, dtype=torch.long, device=device)
    modality = model.config.index(spec.name)
    for step in range(spec.max_tokens):
        entry = fed.repeat(branches).unsqueeze(1)
        place = torch.full_like(entry, step if step < spec.position_limit else 0)
        y = model.decode(context.encoded, entry, torch.full_like(entry, modality), place, None,
                         context.caches)  # fmt: skip
        logits = model.logits(y[:, 0], spec).float()
        guided = _combined(logits, weights)
        if observe:
            observe(Step(active.unsqueeze(1) * 0 + step, guided.unsqueeze(1),
                         logits.unsqueeze(1).chunk(branches)))  # fmt: skip
        fed, _ = sample(guided, noise[active, step], decoding.temperature, decoding.top_k,
                        decoding.top_p)  # fmt: skip
        ended = fed == LAST
        lengths[active[ended]] = step
        ids[active, step] = torch.where(ended, 0, fed)
        sure[active, step] = guided.softmax(-1).gather(1, fed.unsqueeze(1)).squeeze(1)
        if bool(ended.any()):
            # Finished rows leave the batch at once.
            kept = (~ended).nonzero().squeeze(1)
            if not len(kept):
                break
            every = torch.cat([kept + branch * len(active) for branch in range(branches)])
            context.pick(every)
            active, fed = active[kept], fed[kept]
    return Drawn(ids, sure, lengths)


def as_condition(config: FourMConfig, target: str, drawn: Drawn) -> Shown:
    """Decoded tokens as a condition of further targets: grids whole, texts through [EOS]."""
    if config.by_name[target].kind != "seq":
        return Shown(drawn.ids, torch.ones_like(drawn.ids, dtype=torch.bool))
    place = torch.arange(drawn.ids.shape[1], device=drawn.ids.device)
    inside = place < drawn.lengths.unsqueeze(1)
    ended = ((drawn.ids == EOS_ID) & inside).cumsum(1) - ((drawn.ids == EOS_ID) & inside).int()
    return Shown(drawn.ids, inside & (ended == 0))
