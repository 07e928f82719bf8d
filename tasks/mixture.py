"""Several token sets as one stream of masked batches.

The batch of a step is a pure function of (manifests, seed, step) for any number of workers. Which
source a sample comes from is settled in cycles of 1000 samples, in each of which every source has
its exact share in an order drawn anew; so the place of a sample in its source's epoch is known
without walking there, and every source is visited whole before it repeats.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from infra.manifest import Manifest, load_manifest, manifest_names, versions
from infra.store import Store
from models.fourm.batch import Batch
from models.fourm.draws import Draws
from models.fourm.loader import TokenDataset, stored_name
from models.fourm.masking import Mixture, Samples, mask_batch
from models.fourm.spec import FourMConfig, ModalitySpec
from tasks.recipes import Source, TrainRecipe
from tasks.specs import chosen_specs, modality_specs, own_names, resolve, tokenizer_key

CYCLE = 1000
SetOf = tuple[Store, Manifest]


@dataclass(frozen=True)
class Bound:
    """A source of a recipe with the sets it reads: one, or several of the same samples (say, at
    two resolutions) that are read side by side."""

    source: Source
    sets: tuple[SetOf, ...]
    specs: tuple[tuple[ModalitySpec, ...], ...]
    """Modalities taken from each set."""

    @property
    def names(self) -> frozenset[str]:
        """Full names of its modalities."""
        return frozenset(spec.name for specs in self.specs for spec in specs)


def open_sets(
    store: Store, recipe: TrainRecipe, given: Mapping[str, str] | str
) -> dict[str, list[SetOf]]:
    """The sets of each source of a recipe.

    Args:
        store: The dataset.
        recipe: The recipe.
        given: Source -> "manifest" of `store`, "root#manifest" of another one, or several joined
            by "+" to be read side by side; a manifest alone is for a recipe with one source. What
            is current counts, or a version that is named: "manifest@2".

    Raises:
        ValueError: a manifest does not exist, or the recipe mixes several sets and only one is
            given.
    """
    names = [source.name for source in recipe.all_sources]
    if isinstance(given, str):
        if len(names) > 1:
            raise ValueError(f"the recipe mixes {', '.join(names)}: name the manifest of each "
                             f"with --data '{{\"{names[0]}\": \"main\", ...}}'")
        given = {names[0]: given}
    return {name: [_open_set(store, one) for one in sets.split("+")]
            for name, sets in given.items()}


def _open_set(store: Store, given: str) -> SetOf:
    root, separate, said = given.rpartition("#")
    where = Store(root) if separate else store
    names = manifest_names(where)
    name, _, version = said.partition("@")
    if name not in names:
        have = f"there are {', '.join(names)}" if names else "`fourm publish` makes one"
        raise ValueError(f"no manifest {name!r} in {where.url}; {have}")
    if version and int(version) not in (there := versions(where, name)):
        raise ValueError(f"{name} in {where.url} has the versions {there}, not {version}")
    return where, load_manifest(where, name, int(version) if version else None)


def bind(
    recipe: TrainRecipe, sets: Mapping[str, Sequence[SetOf]]
) -> tuple[Bound, ...]:
    """Gives every source of a recipe its sets.

    Args:
        recipe: The recipe.
        sets: Name of the source -> its sets.

    Raises:
        ValueError: a source has no set, a set no source, or a set lacks a modality.
    """
    sources = recipe.all_sources
    names = [source.name for source in sources]
    if set(names) != set(sets):
        missing, odd = sorted(set(names) - set(sets)), sorted(set(sets) - set(names))
        said = [f"lacks data for {', '.join(missing)}"] if missing else []
        said += [f"knows no source {', '.join(odd)}"] if odd else []
        raise ValueError(f"the recipe {' and '.join(said)}; its sources are {', '.join(names)}")
    return tuple(_bound(recipe, source, tuple(sets[source.name])) for source in sources)


def _bound(recipe: TrainRecipe, source: Source, sets: tuple[SetOf, ...]) -> Bound:
    offered = [modality_specs(manifest, max_text=recipe.max_text) for _, manifest in sets]
    everything = [name for specs in offered for name in own_names(specs).values()]
    wanted = source.modalities or recipe.modalities or everything
    where = " + ".join(f"{manifest.name} v{manifest.version}" for _, manifest in sets)
    taken: set[str] = set()
    parts = []
    # The first set that holds a modality gives it; with others it differs in resolution only.
    for specs in offered:
        parts.append([spec for spec in specs if spec.name not in taken])
        taken |= {spec.name for spec in specs}
    chosen = chosen_specs([s for part in parts for s in part], wanted, recipe.predicts, where)
    by_name = {spec.name: spec for spec in chosen}
    return Bound(source, sets, tuple(
        tuple(by_name[spec.name] for spec in part if spec.name in by_name) for part in parts
    ))


def shared_specs(bound: Sequence[Bound]) -> tuple[ModalitySpec, ...]:
    """The modalities of all sources together.

    Raises:
        ValueError: two sources hold a modality in different tokens; names both.
    """
    found: dict[str, tuple[ModalitySpec, str, Any]] = {}
    for part in bound:
        for (_, manifest), specs in zip(part.sets, part.specs, strict=True):
            for spec in specs:
                entry = manifest.tokenizers.get(tokenizer_key(stored_name(spec.name)), {})
                mark = entry.get("fingerprint") if spec.discrete else None
                known, where, before = found.setdefault(
                    spec.name, (spec, part.source.name, mark)
                )
                if (known, before) != (spec, mark):
                    raise ValueError(f"{spec.name} has other tokens in {part.source.name} than in "
                                     f"{where}: tokenize one set with the tokenizers of the "
                                     "other, `fourm train-tokenizers --like ROOT`")
    return tuple(spec for spec, _, _ in found.values())


class Interleave:
    """Which source the unit at a position (a sample, or a batch) comes from, and how many units
    of that source came before."""

    def __init__(self, phases: Sequence[tuple[int, Sequence[float]]], seed: int) -> None:
        """`phases` are (first position, weights of all sources), the first one at 0."""
        self._seed = seed
        self._starts = [start for start, _ in phases]
        self._quotas = [quota(weights) for _, weights in phases]
        self._cycle = lru_cache(8)(self._cycle_of)
        self._before = [np.zeros(len(phases[0][1]), np.int64)]
        for i, length in enumerate(np.diff(self._starts)):
            full, rest = divmod(int(length), CYCLE)
            part = np.bincount(self._cycle(i, full)[0][:rest], minlength=len(self._quotas[i]))
            self._before.append(self._before[i] + full * self._quotas[i] + part)

    def at(self, position: int) -> tuple[int, int]:
        """(source, units of it before this one)."""
        phase = bisect_right(self._starts, position) - 1
        cycle, offset = divmod(position - self._starts[phase], CYCLE)
        order, rank = self._cycle(phase, cycle)
        source = int(order[offset])
        before = self._before[phase][source] + cycle * self._quotas[phase][source]
        return source, int(before + rank[offset])

    def _cycle_of(self, phase: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of every unit of a cycle, and its number among those of its source."""
        counts = self._quotas[phase]
        order = np.repeat(np.arange(len(counts)), counts)
        if len(counts) > 1:
            order = np.random.default_rng([self._seed, phase, cycle, 2]).permutation(order)
        rank = np.empty(CYCLE, np.int64)
        for source, count in enumerate(counts):
            rank[order == source] = np.arange(count)
        return order, rank


def quota(weights: Sequence[float]) -> np.ndarray:
    """Units of each source in a cycle, by largest remainders.

    Raises:
        ValueError: a weight is too small to get any.
    """
    share = np.array(weights, float) / sum(weights) * CYCLE
    counts = np.floor(share + 1e-9).astype(np.int64)
    rest = np.argsort(-(share - counts), kind="stable")[: CYCLE - counts.sum()]
    counts[rest] += 1
    if ((counts == 0) & (share > 0)).any():
        raise ValueError(f"every weight must be 0 or at least 1/{CYCLE} of their sum, got "
                         f"{list(weights)}")
    return counts


class SourceDraws(Draws):
    """Draws that give every sample a component of its own source."""

    def __init__(
        self, seed: int, step: int, batch_size: int, rows: slice, source: np.ndarray,
        weights: Sequence[Sequence[float]],
    ) -> None:
        """`source` [whole batch]; `weights` of the components of each source, which lie behind
        one another in the mixture."""
        super().__init__(seed, step, batch_size, rows)
        self._source, self._weights = source, weights

    def components(self, weights: Sequence[float], per_batch: bool) -> np.ndarray:
        """Index of the component of every sample of the whole batch, by the weights of its source
        instead of `weights`."""
        size = 1 if per_batch else len(self._source)
        drawn = self.generator("component").random(size)
        chosen = np.zeros(size, np.int64)
        first = 0
        for source, own in enumerate(self._weights):
            rows = self._source[:size] == source
            ends = np.cumsum(own)
            chosen[rows] = first + np.searchsorted(ends, drawn[rows] * ends[-1], side="right")
            first += len(own)
        return np.broadcast_to(chosen, len(self._source))


class SideBySide:
    """Sets of the same samples, read as one: the modalities of all of them."""

    def __init__(self, parts: Sequence[TokenDataset]) -> None:
        """Raises ValueError when the sets differ in samples or crops."""
        self.parts, first = list(parts), parts[0]
        self.order = first.order
        for other in parts[1:]:
            where = f"{first.manifest.name} and {other.manifest.name}"
            digests = [[part.manifest.key_digest(shard) for shard in part.shards]
                       for part in (first, other)]
            if digests[0] != digests[1]:
                raise ValueError(f"{where} do not hold the same samples in the same order")
            crops = [dataclasses.replace(part.policy, size=1) for part in (first, other)]
            if crops[0] != crops[1]:
                raise ValueError(f"{where} were cropped differently")

    def __len__(self) -> int:
        return len(self.parts[0])

    def samples(self, picked: Sequence[tuple[int, int, float]] | np.ndarray) -> Samples:
        """Samples of these places, see `TokenDataset.samples`."""
        return _united([part.samples(picked) for part in self.parts])

    def fixed(self, start: int, count: int) -> Samples:
        """Samples in stored order, see `TokenDataset.fixed`."""
        return _united([part.fixed(start, count) for part in self.parts])


def open_split(part: Bound, split: str, *, seed: int = 0, crops: int | None = None) -> SideBySide:
    """One split of a source. Raises ValueError for sets that do not fit the recipe."""
    return SideBySide([
        TokenDataset(store, manifest, split, specs, seed=seed, crops=crops)
        for (store, manifest), specs in zip(part.sets, part.specs, strict=True)
    ])


class MixedData:
    """The batches of a training."""

    def __init__(self, recipe: TrainRecipe, bound: Sequence[Bound], config: FourMConfig) -> None:
        """Raises ValueError for masks that no batch can fill, or sets that do not fit."""
        self.recipe, self.config = recipe, config
        self.training = recipe.training
        self.mixture = joint_mixture(bound, config)
        self.parts = [open_split(part, "train", seed=self.training.seed) for part in bound]
        self._phases = phase_weights(recipe)
        unit = 1 if self.mixture.per_batch else self.training.batch_size
        starts = [(-(-step // recipe.repeats) * unit, weights[0]) for step, weights in self._phases]
        self._interleave = Interleave(starts, self.training.seed)
        # Parts of a batch that are accumulated come in turn, so each is kept until it repeats.
        self._loaded = lru_cache(16 if recipe.repeats > 1 else 1)(self._load)

    def batch(self, step: int, rank: int, world: int) -> Batch:
        """Rows rank::world of the masked batch of `step`."""
        rows = slice(rank, None, world)
        samples, source = self._loaded(step // self.recipe.repeats, rank, world)
        weights = next(w for first, w in reversed(self._phases) if first <= step)[1]
        draws = SourceDraws(self.training.seed, step, self.training.batch_size, rows, source,
                            weights)
        return mask_batch(self.config, samples, self.mixture, draws)

    def _load(self, load: int, rank: int, world: int) -> tuple[Samples, np.ndarray]:
        """Unmasked rows of the batch of a load, and the source of each sample of the batch."""
        size = self.training.batch_size
        if self.mixture.per_batch:
            source, number = self._interleave.at(load)
            places = [(source, number * size + row) for row in range(size)]
        else:
            places = [self._interleave.at(load * size + row) for row in range(size)]
        which = np.array([source for source, _ in places])
        mine = places[rank::world]
        found = {}
        for source in sorted({source for source, _ in mine}):
            part = self.parts[source]
            numbers = [number for owner, number in mine if owner == source]
            found[source] = part.samples(part.order.places(np.array(numbers)))
        if len(found) == 1:
            return next(iter(found.values())), which
        return merged(found, which[rank::world]), which


def joint_mixture(bound: Sequence[Bound], config: FourMConfig) -> Mixture:
    """The components of all sources behind one another, by full names.

    Raises:
        ValueError: masks that no batch can fill, or sources that disagree on masking per batch.
    """
    mixtures = [resolve(part.source.mixture, config, part.names) for part in bound]
    if len({mixture.per_batch for mixture in mixtures}) > 1:
        raise ValueError("either all sources mask per batch, or none")
    components = tuple(c for mixture in mixtures for c in mixture.components)
    return Mixture(components=components, per_batch=mixtures[0].per_batch)


Weights = tuple[list[float], list[tuple[float, ...]]]
"""Of the sources, and of the components of each."""


def phase_weights(recipe: TrainRecipe) -> list[tuple[int, Weights]]:
    """(first step, weights) of every phase of a run, the first one at step 0.

    Raises:
        ValueError: a phase leaves no source.
    """
    sources = {source.name: source.weight for source in recipe.all_sources}
    masks = {source.name: tuple(c.weight for c in source.mixture.components)
             for source in recipe.all_sources}
    found: dict[int, Weights] = {0: (list(sources.values()), list(masks.values()))}
    for phase in recipe.phases:
        sources |= dict(phase.sources)
        masks |= {name: tuple(weights) for name, weights in phase.components.items()}
        if not sum(sources.values()):
            raise ValueError(f"the phase at {phase.since} leaves no source with a weight")
        # Loads are whole: a phase begins with the first step that loads new samples.
        step = round(phase.since * recipe.training.steps)
        step = -(-step // recipe.repeats) * recipe.repeats
        found[step] = (list(sources.values()), list(masks.values()))
    return sorted(found.items())


def merged(parts: Mapping[int, Samples], source: np.ndarray) -> Samples:
    """One `Samples` of the samples of several sources: row i is the next one of source[i]. What a
    source lacks is marked absent."""
    rows = {number: np.flatnonzero(source == number) for number in parts}
    held: dict[str, dict[str, Any]] = {}
    present: dict[str, np.ndarray] = {}
    for item in dataclasses.fields(Samples):
        if item.name == "present":
            continue
        names = sorted({name for part in parts.values() for name in getattr(part, item.name)})
        for name in names:
            values = {n: getattr(p, item.name)[name] for n, p in parts.items()
                      if name in getattr(p, item.name)}
            here = np.zeros(len(source), bool)
            for number in values:
                here[rows[number]] = parts[number].present.get(name, True)
            held.setdefault(item.name, {})[name] = _scattered(values, rows, len(source))
            if not here.all():
                present[name] = here
    return Samples(**held, present=present)


def _scattered(values: Mapping[int, Any], rows: Mapping[int, np.ndarray], size: int) -> Any:
    """Arrays [rows of a source, ...], or tuples of such, as one [size, ...]; zeros elsewhere."""
    first = next(iter(values.values()))
    if isinstance(first, tuple):
        return tuple(_scattered({n: value[i] for n, value in values.items()}, rows, size)
                     for i in range(len(first)))
    shape = np.max([value.shape[1:] for value in values.values()], axis=0).astype(int)
    out = np.zeros((size, *shape), first.dtype)
    for number, value in values.items():
        place: tuple[Any, ...] = (rows[number], *(slice(length) for length in value.shape[1:]))
        out[place] = value
    return out


def _united(parts: Sequence[Samples]) -> Samples:
    """The modalities of all parts, which hold the same samples."""
    held: dict[str, dict[str, Any]] = {}
    for item in dataclasses.fields(Samples):
        held[item.name] = {k: v for part in parts for k, v in getattr(part, item.name).items()}
    return Samples(**held)
