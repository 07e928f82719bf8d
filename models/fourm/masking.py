"""Masking: which (token, modality, position) triples of each sample the model sees and predicts.

Vectorised over the batch. Budgets are Dirichlet draws per modality; what a modality cannot take
goes to the others, so that batches are static and nearly free of padding. Grids show and predict
random disjoint positions, sequences are span-masked: texts by tokens, metadata by chunks, feature
vectors by vectors, with one zero vector for each removed run. B samples, m modalities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from models.fourm.batch import Batch, Dense
from models.fourm.budgets import draw_budgets, redistribute
from models.fourm.draws import Draws
from models.fourm.spans import (
    Ragged,
    cut_chunks,
    cut_targets,
    fit_inputs,
    fit_vectors,
    ranges,
    shuffle_chunks,
    starts,
)
from models.fourm.spec import EOS_ID, FourMConfig, ModalitySpec
from models.fourm.stored import Stored

_MOST_AHEAD = 16
"""Attempts at a span mask that are made at once."""
_TOP = 1 << 31
_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, kw_only=True)
class Component:
    """One way to mask: Dirichlet concentrations per modality (absent = never) and token ranges."""

    inputs: Mapping[str, float]
    targets: Mapping[str, float]
    num_inputs: tuple[int, int]
    """Fewest and most input tokens of a sample."""
    num_targets: tuple[int, int]
    """Fewest and most target slots of a sample."""
    weight: float = 1.0
    """Relative frequency."""
    keep: Literal["random", "all", "binary"] = "random"
    """Share of a sequence that stays visible: uniform in 0..1, all that fits, or all or nothing."""
    least: Mapping[str, int] = field(default_factory=dict)
    """Fewest input tokens of a modality; a draw that gives it less is repeated."""
    spill: bool = True
    """Whether tokens that a modality cannot take go to others; released models were trained with
    False, which leaves 7 to 23 % of the slots empty."""

    def __post_init__(self) -> None:
        for name in ("num_inputs", "num_targets"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be a range of positive numbers, got {low}..{high}")
        if self.weight <= 0:
            raise ValueError(f"weight must be positive, got {self.weight}")
        if self.keep not in ("random", "all", "binary"):
            raise ValueError(f"keep must be random, all or binary, got {self.keep!r}")


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Components and how they are drawn: per sample, or one for a whole batch, whose shape then
    fits the component exactly."""

    components: tuple[Component, ...]
    per_batch: bool = False


@dataclass(frozen=True)
class Samples:
    """Unmasked samples. A modality may be absent in some of them: `present` [B], default all."""

    grids: Mapping[str, np.ndarray | Stored] = field(default_factory=dict)
    """Token ids [B, tokens], of which `grid[rows, positions]` reads those that are chosen."""
    sequences: Mapping[str, Ragged] = field(default_factory=dict)
    """Ids [B, L] with [EOS] at the end, and lengths [B]."""
    pixels: Mapping[str, np.ndarray] = field(default_factory=dict)
    """uint8 patches [B, positions, patch * patch * channels]."""
    vectors: Mapping[str, Ragged] = field(default_factory=dict)
    """Feature vectors [B, L, C], floats, and lengths [B]."""
    present: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        for values in (*self.grids.values(), *self.pixels.values()):
            return len(values)
        return len(next(iter({**self.sequences, **self.vectors}.values()))[1])


def mask_batch(
    config: FourMConfig, samples: Samples, mixture: Mixture, draws: Draws
) -> Batch:
    """Draws masks of `mixture` for `samples` (this worker's rows of the batch of `draws`)."""
    names = [m.name for m in config.modalities]
    parts = mixture.components
    chosen = draws.components([part.weight for part in parts], mixture.per_batch)
    lows, highs = (np.array([[getattr(c, f)[i] for f in ("num_inputs", "num_targets")]
                             for c in parts]) for i in (0, 1))
    totals = [draws.integers(f"count{i}", lows[chosen, i], highs[chosen, i]) for i in (0, 1)]
    width = highs[chosen].max(0)
    alpha_in = np.array([[c.inputs.get(n, 0.0) for n in names] for c in parts])[chosen]
    alpha_out = np.array([[c.targets.get(n, 0.0) for n in names] for c in parts])[chosen]
    own = chosen[draws.rows]
    least = np.array([[c.least.get(n, 0) for n in names] for c in parts])[own]
    spill = np.array([c.spill for c in parts])[own, None]
    state = _Masks(config, samples, draws)
    budget, share = draw_budgets(draws, "input", alpha_in, totals[0], state.input_limit(), least)
    state.set_inputs(budget, share * spill, np.array([c.keep for c in parts])[own])
    limit = state.target_limit()
    budget, share = draw_budgets(draws, "target", alpha_out, totals[1], limit, 0 * least)
    state.set_targets(budget, share * spill)
    return state.batch(int(width[0]), int(width[1]))


def transfer_batch(
    config: FourMConfig, samples: Samples, inputs: Sequence[str], targets: Sequence[str],
    draws: Draws,
) -> Batch:
    """The fixed masks of an evaluation: `inputs` fully visible, `targets` fully masked."""
    state, none = _Masks(config, samples, draws), np.zeros
    size = len(samples), len(config.modalities)
    full_in, full_out = none(size, int), none(size, int)
    full_in[:, [config.index(name) for name in inputs]] = np.iinfo(np.int32).max
    full_out[:, [config.index(name) for name in targets]] = np.iinfo(np.int32).max
    state.set_inputs(np.minimum(full_in, state.input_limit()), none(size), np.full(size[0], "all"))
    state.set_targets(np.minimum(full_out, state.target_limit()), none(size))
    # One slot at least, where all samples lack what is asked for.
    return state.batch(*(max(1, int(counts.sum(1).max())) for counts in
                         (state.inputs, state.targets)))


class _Masks:
    """Budgets of one batch while they are settled: sequences first, whose length is only known once
    they are masked, then grids, which take what sequences left."""

    def __init__(self, config: FourMConfig, samples: Samples, draws: Draws) -> None:
        self.config, self.samples, self.draws = config, samples, draws
        self.sequences = [m for m in config.modalities
                          if m.name in samples.sequences or m.name in samples.vectors]
        self.chunks: dict[str, np.ndarray] = {}
        self.texts = {m.name: self._text(m) for m in self.sequences}
        size = len(samples), len(config.modalities)
        self.inputs, self.targets = np.zeros(size, int), np.zeros(size, int)
        self.visible: dict[str, Ragged] = {}
        self.spans: dict[str, Ragged] = {}
        self.here = np.ones(size, bool)
        for name, present in samples.present.items():
            self.here[:, config.index(name)] = present
        self.is_seq = np.array([m.kind in ("seq", "seq_emb") for m in config.modalities])

    def _text(self, spec: ModalitySpec) -> Ragged:
        """Ids of a sequence [B,L] and lengths [B], its chunks in random order; for vectors, ids
        that mean nothing."""
        if spec.name in self.samples.vectors:
            vectors, length = self.samples.vectors[spec.name]
            return np.zeros(vectors.shape[:2], np.int64), length
        ids, length = self.samples.sequences[spec.name]
        if not spec.chunk:
            return ids, length
        place = np.arange(ids.shape[1])
        last = (place == length[:, None] - 1) & (ids == EOS_ID)
        chunk = np.where(last, ids.shape[1], place // spec.chunk)
        order = self.draws.uniform(f"{spec.name} chunks", spec.max_tokens)
        order = np.take_along_axis(order, chunk % spec.max_tokens, 1) + last
        ids, chunk = shuffle_chunks(ids, length, chunk, order)
        length = cut_chunks(length, chunk, spec.max_tokens)
        width = max(1, int(length.max(initial=0)))
        self.chunks[spec.name] = chunk[:, :width]
        return ids[:, :width], length

    def input_limit(self) -> np.ndarray:
        """Most input slots [B,m] each modality can fill."""
        limit = np.zeros_like(self.inputs)
        for i, spec in enumerate(self.config.modalities):
            if not spec.is_input:
                continue
            if spec.name in self.texts:
                limit[:, i] = self.texts[spec.name][1]
            elif spec.name in self.samples.grids or spec.name in self.samples.pixels:
                limit[:, i] = spec.max_tokens
        return limit * self.here

    def target_limit(self) -> np.ndarray:
        """Most target slots [B,m]: grid positions not visible, ids of a target sequence less 1."""
        limit = np.zeros_like(self.targets)
        for i, spec in enumerate(self.config.modalities):
            if spec.is_target and spec.name in self.samples.grids:
                limit[:, i] = spec.max_tokens - self.inputs[:, i]
            elif spec.is_target and spec.name in self.spans:
                limit[:, i] = self.spans[spec.name][1] - 1
        return limit * self.here

    def _attempts(
        self, spec: ModalitySpec, width: int
    ) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """Uniforms [n,width] for attempts [n] at masking rows [n], equal within a chunk."""
        def draw(attempts: np.ndarray, rows: np.ndarray) -> np.ndarray:
            if spec.name not in self.chunks:
                return self.draws.some(spec.name, width, rows, attempts)
            drawn = self.draws.some(spec.name, spec.max_tokens, rows, attempts)
            return np.take_along_axis(drawn, self.chunks[spec.name][rows] % spec.max_tokens, 1)

        return draw

    def set_inputs(self, budget: np.ndarray, share: np.ndarray, keep: np.ndarray) -> None:
        """Settles the input slots [B,m] of all modalities; keep [B] as in `Component`."""
        limit, total = self.input_limit(), budget.sum(1)
        budget = redistribute(budget, limit, share)
        whole, binary = keep == "all", keep == "binary"
        for spec in self.sequences:
            i = self.config.index(spec.name)
            ids, length = self.texts[spec.name]
            tag = spec.name
            chance = self.draws.uniform(f"{tag} keep")
            chance[binary] = chance[binary].round()
            # Without a budget nothing stays, and all of a sequence in chunks is to be predicted.
            chance[whole] = budget[whole, i] > 0
            attempts = self._attempts(spec, ids.shape[1])
            if spec.kind == "seq_emb":
                self.visible[tag] = fit_vectors(length, ids.shape[1], chance, budget[:, i],
                                                attempts, most_ahead=_MOST_AHEAD)
            else:
                self.visible[tag], self.spans[tag] = fit_inputs(
                    ids, length, chance, budget[:, i], attempts, chunked=bool(spec.chunk),
                    most_ahead=_MOST_AHEAD)
            budget[:, i] = self.visible[tag][1]
        self.inputs = self._refill(budget, limit, total, share)

    def set_targets(self, budget: np.ndarray, share: np.ndarray) -> None:
        """Settles the target slots [B,m] of all modalities."""
        limit, total = self.target_limit(), budget.sum(1)
        budget = redistribute(budget, limit, share)
        for spec in self.sequences:
            if spec.name not in self.spans:
                continue
            i = self.config.index(spec.name)
            ids = np.where(budget[:, i] > 0, budget[:, i] + 1, 0)
            count = np.maximum(starts(self.spans[spec.name][0]), 1)
            choice = (self.draws.uniform(f"{spec.name} cut") * count).astype(int)
            self.spans[spec.name] = cut_targets(self.spans[spec.name], ids, choice)
            budget[:, i] = np.maximum(self.spans[spec.name][1] - 1, 0)
        self.targets = self._refill(budget, limit, total, share)

    def _refill(
        self, budget: np.ndarray, limit: np.ndarray, total: np.ndarray, share: np.ndarray
    ) -> np.ndarray:
        """Gives to grids what sequences did not use."""
        grids = np.where(self.is_seq, 0.0, share)
        slack = np.maximum(total - budget.sum(1), 0)
        wanted = budget.copy()
        wanted[np.arange(len(budget)), grids.argmax(1)] += np.where(grids.sum(1) > 0, slack, 0)
        return redistribute(wanted, np.where(self.is_seq, budget, limit), grids)

    def batch(self, num_inputs: int, num_targets: int) -> Batch:
        """Lays the chosen triples out as a batch of static width."""
        import torch

        enc, dec = _Layout(self.inputs, num_inputs), _Layout(self.targets, num_targets)
        shown, asked = zip(*(self._chosen(i) for i in range(len(self.config.modalities))),
                           strict=True)
        enc_ids, enc_pos = (enc.lay(values) for values in zip(*shown, strict=True))
        fed, positions, targets = zip(*asked, strict=True)
        dec_ids, dec_pos = (dec.lay(values) for values in (fed, positions))
        enc_mod, dec_mod = (layout.modality() for layout in (enc, dec))
        # Unused slots count as those of modality 0.
        ends = np.where(self.is_seq, -1, np.cumsum(self.targets, 1))
        until = dec.spread(np.concatenate([ends, ends[:, :1]], 1))
        np.copyto(until, np.arange(1, num_targets + 1), where=until < 0)
        tensor = torch.from_numpy
        return Batch(
            tensor(enc_ids), tensor(enc_mod), tensor(enc_pos),
            tensor(dec_ids), tensor(dec_mod), tensor(dec_pos),
            tensor(until), tensor(dec.slots), tensor(np.concatenate(targets)),
            tuple(self.targets.sum(0).tolist()), self._dense(enc_mod, enc_pos),
        )

    def _dense(self, mod: np.ndarray, pos: np.ndarray) -> dict[str, Dense]:
        import torch

        found = {}
        for name, patches in self.samples.pixels.items():
            row, slot = np.nonzero(mod == self.config.index(name))
            values = patches[row, pos[row, slot]]
            flat = row * mod.shape[1] + slot
            found[name] = Dense(torch.from_numpy(values), torch.from_numpy(flat))
        for name, (vectors, _) in self.samples.vectors.items():
            row, slot = np.nonzero(mod == self.config.index(name))
            source = self.visible[name][0][row, pos[row, slot]]
            values = np.where(source[:, None] < 0, 0, vectors[row, source]).astype(np.float32)
            flat = row * mod.shape[1] + slot
            found[name] = Dense(torch.from_numpy(values), torch.from_numpy(flat))
        for spec in self.config.inputs:
            if not spec.discrete and spec.name not in found:
                # None of it here, but workers exchange gradients of the same parameters.
                kind = torch.uint8 if spec.kind == "pixels" else torch.float32
                found[spec.name] = Dense(torch.zeros(0, spec.dense_width, dtype=kind),
                                         torch.zeros(0, dtype=torch.long))
        return found

    def _chosen(self, i: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """Ids and positions [n] of the input slots of modality i, sample by sample; and the ids
        that are fed, positions and targets [n] of its target slots."""
        spec, seen, asked = self.config.modalities[i], self.inputs[:, i], self.targets[:, i]
        if spec.name not in self.visible:
            return self._of_grid(spec, seen, asked)
        shown, feed = (_NONE, _NONE), (_NONE, _NONE, _NONE)
        if seen.any():
            ids, place, rank = _heads(self.visible[spec.name][0], seen)
            shown = np.zeros_like(rank) if spec.kind == "seq_emb" else ids[place], rank
        if asked.any():
            ids, place, rank = _heads(self.spans[spec.name][0], asked)
            rank[rank >= spec.position_limit] = 0
            feed = ids[place], rank, ids[place + 1]
        return shown, feed

    def _of_grid(
        self, spec: ModalitySpec, seen: np.ndarray, asked: np.ndarray
    ) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """`_chosen` of a grid: of its positions in a random order, the first `seen` [B] are inputs,
        the next `asked` [B] targets; each of these then sorted."""
        if not (seen.any() or asked.any()):
            return (_NONE, _NONE), (_NONE, _NONE, _NONE)
        every, size = np.arange(len(seen)), spec.max_tokens
        keys, order = self._order(spec)
        inputs = keys < order[every, seen, None]
        targets = (keys < order[every, seen + asked, None]) ^ inputs
        found = []
        for count, chosen in ((seen, inputs), (asked, targets)):
            sample = np.repeat(every, count)
            found.append((sample, np.flatnonzero(chosen) - sample * size))
        if spec.name in self.samples.pixels:
            return (np.zeros_like(found[0][1]), found[0][1]), (_NONE, _NONE, _NONE)
        grid = self.samples.grids[spec.name]
        return ((grid[found[0]], found[0][1]),
                (np.zeros_like(found[1][1]), found[1][1], grid[found[1]]))

    def _order(self, spec: ModalitySpec) -> tuple[np.ndarray, np.ndarray]:
        """A random number [B, positions] for every position of a grid, all different, and the same
        in order and with one above all others behind."""
        size, place = len(self.inputs), np.arange(spec.max_tokens, dtype=np.uint32)
        keys = self.draws.words(f"{spec.name} order", spec.max_tokens)
        # The lowest bits tell equal numbers apart, the highest leaves room for one above all.
        keys &= np.uint32(_TOP - (1 << (spec.max_tokens - 1).bit_length()))
        keys |= place
        order = np.full((size, spec.max_tokens + 1), _TOP, np.uint32)
        order[:, :-1] = keys
        order[:, :-1].sort(1)
        return keys, order


class _Layout:
    """Slots [B,width] of a batch: in every sample those of one modality after another, then those
    that are not used."""

    def __init__(self, counts: np.ndarray, width: int) -> None:
        """`counts` [B,m] of the slots of all modalities."""
        self.shape = len(counts), width
        self._runs = np.concatenate([counts, width - counts.sum(1, keepdims=True)], 1)
        first = np.cumsum(counts, 1) - counts + np.arange(0, len(counts) * width, width)[:, None]
        self.slots = ranges(first.T.reshape(-1), counts.T.reshape(-1))
        """[n] in B*width, those that are used, sorted by modality."""

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Values [B,m+1] of modalities and of unused slots in all of their slots."""
        return np.repeat(values.reshape(-1), self._runs.reshape(-1)).reshape(self.shape)

    def modality(self) -> np.ndarray:
        """The modality of every slot, -1 where unused."""
        size, count = self._runs.shape
        return self.spread(np.tile(np.append(np.arange(count - 1), -1), (size, 1)))

    def lay(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Values of all modalities in `slots`, as int64; 0 elsewhere."""
        out = np.zeros(self.shape, np.int64)
        out.reshape(-1)[self.slots] = np.concatenate(values)
        return out


def _heads(ids: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids [B,L] as [B*L], where the first `count` [B] of every row lie in it, and their place in
    the row."""
    row = np.arange(len(ids)) * ids.shape[1]
    place = ranges(row, count)
    return ids.reshape(-1), place, place - np.repeat(row, count)
