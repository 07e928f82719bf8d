"""Masking: which (token, modality, position) triples of each sample the model sees and predicts.

Vectorised over the batch. Budgets are Dirichlet draws per modality; what a modality cannot take
goes to the others, so that batches are static and nearly free of padding. Grids show and predict
random disjoint positions, sequences are span-masked. B samples, m modalities.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from models.fourm.batch import Batch, Dense, loss_rows
from models.fourm.spans import Ragged, cut_targets, fit_inputs
from models.fourm.spec import FourMConfig, ModalitySpec


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
    keep: Literal["random", "all"] = "random"
    """Share of a sequence that stays visible: uniform in 0..1, or all that fits."""

    def __post_init__(self) -> None:
        for name in ("num_inputs", "num_targets"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be a range of positive numbers, got {low}..{high}")
        if self.weight <= 0:
            raise ValueError(f"weight must be positive, got {self.weight}")


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Components and how they are drawn: per sample, or one for a whole batch, whose shape then
    fits the component exactly."""

    components: tuple[Component, ...]
    per_batch: bool = False


@dataclass(frozen=True)
class Samples:
    """Unmasked samples. A modality may be absent in some of them: `present` [B], default all."""

    grids: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Token ids [B, tokens]."""
    sequences: Mapping[str, Ragged] = field(default_factory=dict)
    """Ids [B, L] with [EOS] at the end, and lengths [B]."""
    pixels: Mapping[str, np.ndarray] = field(default_factory=dict)
    """uint8 patches [B, positions, patch * patch * channels]."""
    present: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        for values in (*self.grids.values(), *self.pixels.values()):
            return len(values)
        return len(next(iter(self.sequences.values()))[1])


class Draws:
    """Random numbers as a pure function of (seed, step, tag), the same for any number of workers:
    they are drawn for the whole batch and cut to this worker's rows."""

    def __init__(self, seed: int, step: int, batch_size: int, rows: slice = slice(None)) -> None:
        self._key, self._size, self.rows = (seed, step), batch_size, rows

    def generator(self, tag: str) -> np.random.Generator:
        """The generator of one purpose."""
        return np.random.default_rng([*self._key, zlib.crc32(tag.encode())])

    def uniform(self, tag: str, *shape: int) -> np.ndarray:
        """Uniforms [B, *shape] in 0..1."""
        return self.generator(tag).random((self._size, *shape))[self.rows]

    def components(self, mixture: Mixture) -> np.ndarray:
        """Index of the component of every sample of the whole batch."""
        weights = np.cumsum([component.weight for component in mixture.components])
        size = 1 if mixture.per_batch else self._size
        drawn = self.generator("component").random(size) * weights[-1]
        return np.broadcast_to(np.searchsorted(weights, drawn, side="right"), self._size)

    def integers(self, tag: str, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Integers [B] in low..high, both [whole batch] and included."""
        return self.generator(tag).integers(low, high + 1)[self.rows]

    def dirichlet(self, tag: str, alpha: np.ndarray, *extra: int) -> np.ndarray:
        """Shares [B, *extra, m] for concentrations [whole batch, m], 0 where alpha is 0.

        Works on logarithms, so concentrations of 0.001 do not underflow to all zeros:
        Gamma(a) = Gamma(a + 1) * U^(1/a).
        """
        generator = self.generator(tag)
        alpha = alpha.reshape(len(alpha), *[1] * len(extra), alpha.shape[1])
        shape = (self._size, *extra, alpha.shape[-1])
        safe = np.where(alpha > 0, alpha, 1.0)
        log = np.log(generator.standard_gamma(safe + 1, shape))
        log += np.log1p(-generator.random(shape)) / safe
        log = np.where(alpha > 0, log, -np.inf)[self.rows]
        share = np.exp(log - log.max(-1, keepdims=True))
        return share / share.sum(-1, keepdims=True)


def split_budget(share: np.ndarray, total: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """Budgets [B,m] that sum to `total` [B]: floors of share [B,m] * total, what is left over goes
    one by one to the modalities in picks [B, >= m]."""
    budget = np.floor(share.astype(np.float32) * total[:, None].astype(np.float32)).astype(int)
    left = total - budget.sum(1)
    given = np.arange(picks.shape[1]) < left[:, None]
    row, col = np.nonzero(given)
    np.add.at(budget, (row, picks[row, col]), 1)
    return budget


def redistribute(budget: np.ndarray, limit: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Clamps budget [B,m] to limit [B,m] and gives the excess to modalities that have room and a
    share, in proportion to it; what fits nowhere is lost."""
    total = budget.sum(1)
    budget = np.minimum(budget, limit)
    for _ in range(2 * budget.shape[1]):
        left = total - budget.sum(1)
        room = np.where(share > 0, limit - budget, 0)
        if not ((left > 0) & (room.sum(1) > 0)).any():
            break
        weight = np.where(room > 0, np.maximum(share, 1e-9), 0.0)
        weight /= np.maximum(weight.sum(1, keepdims=True), 1e-300)
        extra = np.floor(weight * left[:, None]).astype(int)
        # The rest of the floors goes to the largest weight, so that every round makes progress.
        extra[np.arange(len(extra)), weight.argmax(1)] += left - extra.sum(1)
        budget = budget + np.minimum(np.maximum(extra, 0), room)
    return budget


def mask_batch(
    config: FourMConfig, samples: Samples, mixture: Mixture, draws: Draws
) -> Batch:
    """Draws masks of `mixture` for `samples` (this worker's rows of the batch of `draws`)."""
    names = [m.name for m in config.modalities]
    chosen = draws.components(mixture)
    parts = mixture.components
    lows, highs = (np.array([[getattr(c, f)[i] for f in ("num_inputs", "num_targets")]
                             for c in parts]) for i in (0, 1))
    totals = [draws.integers(f"count{i}", lows[chosen, i], highs[chosen, i]) for i in (0, 1)]
    width = highs[np.unique(chosen)].max(0)
    alpha_in = np.array([[c.inputs.get(n, 0.0) for n in names] for c in parts])[chosen]
    alpha_out = np.array([[c.targets.get(n, 0.0) for n in names] for c in parts])[chosen]
    keep_all = np.array([c.keep == "all" for c in parts])[chosen][draws.rows]
    state = _Masks(config, samples, draws)
    share = draws.dirichlet("inputs", alpha_in)
    picks = draws.dirichlet("input rest", alpha_in, len(names)).argmax(-1)
    state.set_inputs(split_budget(share, totals[0], picks), share, keep_all)
    share = draws.dirichlet("targets", alpha_out)
    picks = draws.dirichlet("target rest", alpha_out, len(names)).argmax(-1)
    state.set_targets(split_budget(share, totals[1], picks), share)
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
    state.set_inputs(np.minimum(full_in, state.input_limit()), none(size), np.ones(size[0], bool))
    state.set_targets(np.minimum(full_out, state.target_limit()), none(size))
    return state.batch(int(state.inputs.sum(1).max()), int(state.targets.sum(1).max()))


class _Masks:
    """Budgets of one batch while they are settled: sequences first, whose length is only known once
    they are masked, then grids, which take what sequences left."""

    def __init__(self, config: FourMConfig, samples: Samples, draws: Draws) -> None:
        self.config, self.samples, self.draws = config, samples, draws
        self.sequences = [m for m in config.modalities if m.name in samples.sequences]
        size = len(samples), len(config.modalities)
        self.inputs, self.targets = np.zeros(size, int), np.zeros(size, int)
        self.visible: dict[str, Ragged] = {}
        self.spans: dict[str, Ragged] = {}
        self.ranks: dict[str, np.ndarray] = {}
        self.here = np.ones(size, bool)
        for name, present in samples.present.items():
            self.here[:, config.index(name)] = present
        self.is_seq = np.array([m.kind == "seq" for m in config.modalities])

    def input_limit(self) -> np.ndarray:
        """Most input slots [B,m] each modality can fill."""
        limit = np.zeros_like(self.inputs)
        for i, spec in enumerate(self.config.modalities):
            if not spec.is_input:
                continue
            if spec.name in self.samples.sequences:
                limit[:, i] = self.samples.sequences[spec.name][1]
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

    def _attempts(self, spec: ModalitySpec, width: int) -> Callable[[int], np.ndarray]:
        """Uniforms [B,width] for every attempt at masking a sequence."""
        return lambda k: self.draws.uniform(f"{spec.name} {k}", spec.max_tokens)[:, :width]

    def set_inputs(self, budget: np.ndarray, share: np.ndarray, keep_all: np.ndarray) -> None:
        """Settles the input slots [B,m] of all modalities."""
        limit, total = self.input_limit(), budget.sum(1)
        budget = redistribute(budget, limit, share)
        for spec in self.sequences:
            i = self.config.index(spec.name)
            ids, length = self.samples.sequences[spec.name]
            tag = spec.name
            chance = np.where(keep_all, 1.0, self.draws.uniform(f"{tag} keep"))
            self.visible[tag], self.spans[tag] = fit_inputs(
                ids, length, chance, budget[:, i],
                self._attempts(spec, ids.shape[1]),
            )
            budget[:, i] = self.visible[tag][1]
        self.inputs = self._refill(budget, limit, total, share)

    def set_targets(self, budget: np.ndarray, share: np.ndarray) -> None:
        """Settles the target slots [B,m] of all modalities."""
        limit, total = self.target_limit(), budget.sum(1)
        budget = redistribute(budget, limit, share)
        for spec in self.sequences:
            i = self.config.index(spec.name)
            ids = np.where(budget[:, i] > 0, budget[:, i] + 1, 0)
            count = np.maximum(self.spans[spec.name][1] - 1, 1)
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

        enc = [self._input(i, spec) for i, spec in enumerate(self.config.modalities)]
        dec = [self._target(i, spec) for i, spec in enumerate(self.config.modalities)]
        inputs, targets = _pack(enc, num_inputs), _pack(dec, num_targets)
        ends = np.cumsum(self.targets, 1)
        slots = np.arange(num_targets)[None]
        module = np.maximum(targets["mod"], 0)
        until = np.where(self.is_seq[module], slots + 1, np.take_along_axis(ends, module, 1))
        rows, counts = loss_rows(targets["mod"], len(self.config.modalities))
        tensor = torch.from_numpy
        return Batch(
            tensor(inputs["ids"]), tensor(inputs["mod"]), tensor(inputs["pos"]),
            tensor(targets["ids"]), tensor(targets["mod"]), tensor(targets["pos"]),
            tensor(until), tensor(rows), tensor(targets["target"].reshape(-1)[rows]), counts,
            self._dense(inputs),
        )

    def _dense(self, inputs: dict[str, np.ndarray]) -> dict[str, Dense]:
        import torch

        found = {}
        for name, patches in self.samples.pixels.items():
            row, slot = np.nonzero(inputs["mod"] == self.config.index(name))
            values = patches[row, inputs["pos"][row, slot]]
            flat = row * inputs["mod"].shape[1] + slot
            found[name] = Dense(torch.from_numpy(values), torch.from_numpy(flat))
        return found

    def _ranks(self, spec: ModalitySpec) -> np.ndarray:
        """Random rank [B, positions] of every position of a grid."""
        if spec.name not in self.ranks:
            order = self.draws.uniform(f"{spec.name} order", spec.max_tokens)
            self.ranks[spec.name] = order.argsort(1).argsort(1)
        return self.ranks[spec.name]

    def _input(self, i: int, spec: ModalitySpec) -> dict[str, np.ndarray]:
        count = self.inputs[:, i, None]
        if spec.name in self.visible:
            ids = self.visible[spec.name][0]
            used = np.arange(ids.shape[1]) < count
        elif spec.name in self.samples.grids or spec.name in self.samples.pixels:
            used = self._ranks(spec) < count
            ids = self.samples.grids.get(spec.name, np.zeros(used.shape, np.int64))
        else:
            used, ids = np.zeros((len(count), 0), bool), np.zeros((len(count), 0), np.int64)
        position = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        return {"used": used, "ids": ids, "pos": position, "mod": np.full(ids.shape, i)}

    def _target(self, i: int, spec: ModalitySpec) -> dict[str, np.ndarray]:
        count = self.targets[:, i, None]
        shape = len(count), 0
        if spec.name in self.spans:
            ids = self.spans[spec.name][0]
            fed, target = ids[:, :-1], ids[:, 1:]
            position = np.broadcast_to(np.arange(fed.shape[1]), fed.shape)
            used = position < count
            position = np.where(position >= spec.position_limit, 0, position)
        elif spec.name in self.samples.grids:
            rank, shown = self._ranks(spec), self.inputs[:, i, None]
            used = (rank >= shown) & (rank < shown + count)
            target = self.samples.grids[spec.name]
            fed = np.zeros_like(target)
            position = np.broadcast_to(np.arange(fed.shape[1]), fed.shape)
        else:
            used, fed = np.zeros(shape, bool), np.zeros(shape, np.int64)
            target = position = fed
        return {"used": used, "ids": fed, "pos": position, "target": target,
                "mod": np.full(fed.shape, i)}


def _pack(parts: list[dict[str, np.ndarray]], width: int) -> dict[str, np.ndarray]:
    """Moves used entries of all modalities to the front of `width` slots, in order."""
    used = np.concatenate([part["used"] for part in parts], 1)
    row, col = np.nonzero(used)
    slot = (np.cumsum(used, 1) - 1)[row, col]
    packed = {}
    for key in parts[0].keys() - {"used"}:
        values = np.concatenate([part[key] for part in parts], 1)
        packed[key] = np.full((len(used), width), -1 if key == "mod" else 0, np.int64)
        packed[key][row, slot] = values[row, col]
    return packed
