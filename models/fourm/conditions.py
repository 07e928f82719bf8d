"""What the encoder reads while a target is decoded: conditions, whole or in part, packed.

R rows, L positions of a modality, C width of a vector. The encoder reads each set of conditions
once, whatever the number of samples that are drawn from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from models.fourm.attention import PADDING
from models.fourm.batch import Batch, Dense
from models.fourm.model import DecoderBlock, Encoded, FourM, LayerCache
from models.fourm.spec import EOS_ID, NUM_SENTINELS, SENTINEL_0, FourMConfig

FIRST, LAST = SENTINEL_0 + 1, SENTINEL_0 + 2
"""[S_1] opens a wholly masked sequence, [S_2] closes it."""


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

    def padded(self, length: int) -> Shown:
        """Lengthened to `length` positions, the further ones hidden."""
        more = length - self.visible.shape[1]
        if more <= 0:
            return self
        sides = (0, more) if self.values.ndim == 2 else (0, 0, 0, more)
        return Shown(F.pad(self.values, sides), F.pad(self.visible, (0, more)))

    @property
    def holes(self) -> Tensor:
        """Visible sentinels [R], each of which stands for a run of text that is not known."""
        sentinel = (self.values > SENTINEL_0) & (self.values < SENTINEL_0 + NUM_SENTINELS)
        return (sentinel & self.visible).sum(1)


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


def side_by_side(batch: Batch, branches: int) -> Batch:
    """Puts what the branches of a row show behind one another, each as wide as its longest row,
    [R, P] instead of [branches * R, N]: an unconditional branch shows little."""
    count, slots = batch.enc_mod.shape
    rows = count // branches
    used = (batch.enc_mod != PADDING).view(branches, rows, slots).sum(2).amax(1)
    sizes = used.tolist()
    # At least one slot, used or not.
    sizes[0] += not any(sizes)

    def beside(values: Tensor) -> Tensor:
        parts = zip(values.view(branches, rows, slots), sizes, strict=True)
        return torch.cat([part[:, :size] for part, size in parts], 1)

    before = torch.tensor([0, *sizes[:-1]], device=used.device).cumsum(0)
    dense = {}
    for name, part in batch.dense.items():
        row, slot = part.slots // slots, part.slots % slots
        place = row % rows * sum(sizes) + before[row // rows] + slot
        dense[name] = replace(part, slots=place)
    return replace(batch, enc_ids=beside(batch.enc_ids), enc_mod=beside(batch.enc_mod),
                   enc_pos=beside(batch.enc_pos), enc_sizes=tuple(sizes), dense=dense)


@dataclass
class Context:
    """The encoder's output as the decoder's layers read it, of rows of `branches` that lie below
    one another."""

    encoded: Encoded
    caches: list[LayerCache]
    rows: int
    branches: int

    @classmethod
    def read(cls, model: FourM, shown: Mapping[str, Shown], branches: int = 1) -> Context:
        """Runs the encoder, and the decoder's key and value projections of its output."""
        batch = gather_inputs(model.config, shown)
        rows = len(batch.enc_mod) // branches
        if model.register_tokens is None:
            batch = side_by_side(batch, branches)
        encoded = model.encode(batch)
        seen = None
        if isinstance(encoded.mask, tuple) and any(own is not None for _, own in encoded.mask):
            # A row without any input takes nothing from cross-attention.
            parts = batch.enc_mod.split(batch.enc_sizes, 1)
            seen = torch.cat([(part != PADDING).any(1, keepdim=True).expand_as(part)
                              for part in parts], 1)[:, None, :, None]
        caches = []
        for layer in model.decoder:
            block = cast(DecoderBlock, layer)
            keys, values = block.cross_attn.keys(block.context_norm(encoded.context))
            caches.append(LayerCache(cross_kv=(keys, values if seen is None else values * seen)))
        return cls(encoded, caches, rows, branches)

    def pick(self, index: Tensor) -> None:
        """Keeps (or repeats) the rows of `index` in every branch."""
        below = torch.cat([index + i * self.rows for i in range(self.branches)])
        encoded, mask = self.encoded, self.encoded.mask
        if isinstance(mask, tuple):
            mask = tuple((size, own if own is None else own[index]) for size, own in mask)
        elif mask is not None:
            mask = mask[below]

        def chosen(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
            if pair is None:
                return None
            # What does not depend on the branch has one row for all.
            rows = index if len(pair[0]) == self.rows else below
            return pair[0][rows], pair[1][rows]

        self.caches = [LayerCache(chosen(c.self_kv), chosen(c.cross_kv)) for c in self.caches]
        self.encoded, self.rows = Encoded(encoded.context, mask), len(index)


def fill_holes(given: Shown, runs: Shown, sure: Tensor, limit: int) -> tuple[Shown, Tensor]:
    """Puts decoded runs in the place of the sentinels of a text with holes.

    Args:
        given: The text [R, L], its holes being [S_1], [S_2] and so on.
        runs: What was decoded after [S_1]: every run but the first follows its sentinel. [EOS]
            means nothing inside a run and is left out.
        sure: Confidences float32 of the shape of `runs`.
        limit: Longest text; what lies beyond is cut.

    Returns:
        The whole text [R, limit] and its confidences, 1 where a token was given.
    """
    device = sure.device  # token by token: on a GPU each would be a kernel of its own
    given, runs = (Shown(part.values.cpu(), part.visible.cpu()) for part in (given, runs))
    sure = sure.cpu()
    filled = Shown(*(given.values.new_zeros(len(given.values), limit).to(kind)
                     for kind in (torch.long, torch.bool)))  # fmt: skip
    confidence = sure.new_zeros(len(sure), limit)
    for row in range(len(given.values)):
        found: dict[int, list[tuple[int, float]]] = {}
        place = found.setdefault(FIRST, [])
        seen = runs.visible[row]
        for token, share in zip(runs.values[row][seen].tolist(), sure[row][seen].tolist(),
                                strict=True):  # fmt: skip
            if SENTINEL_0 <= token < SENTINEL_0 + NUM_SENTINELS:
                place = found.setdefault(token, [])
            elif token != EOS_ID:
                place.append((token, share))
        whole: list[tuple[int, float]] = []
        for token in given.values[row][given.visible[row]].tolist():
            hole = SENTINEL_0 < token < SENTINEL_0 + NUM_SENTINELS
            whole += found.get(token, []) if hole else [(token, 1.0)]
        for place_, (token, share) in enumerate(whole[:limit]):
            filled.values[row, place_], confidence[row, place_] = token, share
            filled.visible[row, place_] = True
    whole_text = Shown(filled.values.to(device), filled.visible.to(device))
    return whole_text, confidence.to(device)
