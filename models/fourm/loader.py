"""Published token sets as training samples, in an order that is a function of (seed, step).

Tokens are memory-mapped Arrow blocks and are read for one crop only; pixels are cut from the stored
pictures with the window the tokens were cut with. An epoch visits every sample exactly once:
blocks of rows are shuffled, then rows within windows of blocks, so memory does not grow with the
set. Nothing has to be saved to resume.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from infra.blocks import BlockReader
from infra.flat import Flat
from infra.machine import most_files
from infra.manifest import Manifest
from infra.shards import MISSING_EXT, TarIndex
from infra.store import Store
from models import modalities
from models.crops import CropPolicy, crop_box
from models.fourm.batch import patchify
from models.fourm.masking import Samples
from models.fourm.spans import Ragged, ranges
from models.fourm.spec import EOS_ID, ModalitySpec
from models.fourm.stored import Stored
from models.fourm.vectors import pad_vectors, read_vectors

BLOCK_ROWS = 256
WINDOW_BLOCKS = 64
_MOST_FILES = 1 << 14
"""Files that a set keeps mapped: Linux gives a process 65530 maps, and every set of a mixture needs
its own. A window touches `WINDOW_BLOCKS` shards."""


def stored_name(name: str, held: Collection[str] = ()) -> str:
    """Name of a model's modality in a manifest that holds `held`: without the resolution, but for
    those that it holds beside its own."""
    return name if name in held else name.split("@")[0]


class EpochOrder:
    """The order in which `sizes` (rows per shard) are visited, epoch after epoch."""

    def __init__(self, sizes: Sequence[int], seed: int) -> None:
        self._seed = seed
        starts = [range(0, size, BLOCK_ROWS) for size in sizes]
        self._blocks = np.array([(shard, start, min(BLOCK_ROWS, sizes[shard] - start))
                                 for shard, firsts in enumerate(starts) for start in firsts])
        self.total = int(sum(sizes))
        self._order = lru_cache(2)(self._blocks_of)
        self._window = lru_cache(4)(self._rows_of)

    def places(self, positions: np.ndarray) -> np.ndarray:
        """(index of the shard, row, a uniform for the crop) of each of `positions` [n], counted
        from 0 on over all epochs, as float64 [n,3]."""
        epochs, offsets = np.divmod(positions, self.total)
        found = np.empty((len(positions), 3))
        for epoch in np.unique(epochs).tolist():
            _, ends = self._order(epoch)
            windows = np.where(epochs == epoch, np.searchsorted(ends, offsets, side="right"), -1)
            for window in np.unique(windows[windows >= 0]).tolist():
                mine = windows == window
                rows, uniform = self._window(epoch, window)
                inside = offsets[mine] - (ends[window - 1] if window else 0)
                found[mine, :2], found[mine, 2] = rows[inside], uniform[inside]
        return found

    def _blocks_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shuffled blocks of an epoch and the position after each window."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._blocks))
        blocks = self._blocks[order]
        counts = np.add.reduceat(blocks[:, 2], np.arange(0, len(blocks), WINDOW_BLOCKS))
        return blocks, np.cumsum(counts)

    def _rows_of(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Shuffled (shard, row) of a window and one uniform each."""
        blocks, _ = self._order(epoch)
        chosen = blocks[window * WINDOW_BLOCKS : (window + 1) * WINDOW_BLOCKS]
        rows = np.concatenate([np.stack([np.full(size, shard), start + np.arange(size)], 1)
                               for shard, start, size in chosen])
        rng = np.random.default_rng([self._seed, epoch, window, 1])
        return rows[rng.permutation(len(rows))], rng.random(len(rows))


@dataclass(frozen=True)
class _Shard:
    """Open files of one shard."""

    tokens: dict[str, BlockReader]
    members: dict[str, TarIndex]
    keys: list[str]
    columns: dict[str, _Column]


@dataclass(frozen=True)
class _Column:
    """Tokens of one modality of one shard."""

    flat: Flat
    """The crops in order."""
    valid: np.ndarray | None
    """bool [crops, rows], False for holes; None without any."""


class TokenDataset:
    """One split of a manifest as `Samples` for the modalities `specs`.

    Raises ValueError when the manifest lacks a modality or a token set does not fit its
    specification, before anything is trained.
    """

    def __init__(
        self, store: Store, manifest: Manifest, split: str, specs: Sequence[ModalitySpec], *,
        seed: int = 0, crops: int | None = None, cache_bytes: int = 512 << 20,
    ) -> None:
        """`crops` limits the crops used (1 = the centre crop); `cache_bytes` bounds the decoded
        pictures that are kept."""
        self.store, self.manifest, self.specs = store, manifest, tuple(specs)
        self.shards = manifest.shards(split)
        missing = sorted({self._stored_as(s) for s in specs} - manifest.modalities.keys())
        if missing:
            raise ValueError(f"{manifest.name} v{manifest.version} lacks {', '.join(missing)}; it "
                             f"has {', '.join(sorted(manifest.modalities))}")
        # A set of texts alone has no crops.
        self.policy = CropPolicy(**manifest.meta.get("crops", {"num_crops": 1}))
        self.num_crops = min(crops or self.policy.num_crops, self.policy.num_crops)
        sizes = [manifest.samples(shard) for shard in self.shards]
        if not any(sizes):
            raise ValueError(f"{manifest.name} v{manifest.version} holds no samples in its split "
                             f"{split!r} of {len(sizes)} shards")
        self.order = EpochOrder(sizes, seed)
        self._cache: dict[tuple[str | int, ...], np.ndarray] = {}
        self._room = cache_bytes
        self._open: dict[int, _Shard] = {}
        self._most_open = max(1, min(most_files() // 4, _MOST_FILES) // max(1, len(self.specs)))
        self._digested: set[int] = set()
        first = int(np.flatnonzero(sizes)[0])
        self._check(self._shard(first))
        for spec in self.specs:
            if spec.kind == "seq_emb":
                self._vectors(spec, np.array([[first, 0, 0]]))

    def __len__(self) -> int:
        return self.order.total

    def _stored_as(self, spec: ModalitySpec) -> str:
        return stored_name(spec.name, self.manifest.modalities)

    def batch_at(self, step: int, batch_size: int, rows: slice = slice(None)) -> Samples:
        """`rows` of the samples of `step`: the same for every number of workers."""
        positions = np.arange(step * batch_size, (step + 1) * batch_size)[rows]
        return self.samples(self.order.places(positions))

    def fixed(self, start: int, count: int) -> Samples:
        """`count` samples from row `start` on in stored order, centre crop; wraps at the end."""
        sizes = np.cumsum([self.manifest.samples(shard) for shard in self.shards])
        picked = []
        for i in range(start, start + count):
            position = i % len(self)
            shard = int(np.searchsorted(sizes, position, side="right"))
            first = int(sizes[shard - 1]) if shard else 0
            picked.append((shard, position - first, 0.0))
        return self.samples(picked)

    def samples(self, picked: Sequence[tuple[int, int, float]] | np.ndarray) -> Samples:
        """Samples for (index of the shard, row, crop as a fraction of the number of crops)."""
        places = (np.asarray(picked, float) * [1, 1, self.num_crops]).astype(np.int64)
        shards, part = np.unique(places[:, 0], return_inverse=True)
        groups = [(shard, np.flatnonzero(part == i)) for i, shard in enumerate(shards.tolist())]
        grids: dict[str, np.ndarray | Stored] = {}
        sequences: dict[str, Ragged] = {}
        pixels: dict[str, np.ndarray] = {}
        vectors: dict[str, Ragged] = {}
        present: dict[str, np.ndarray] = {}
        for spec in self.specs:
            if spec.kind == "img":
                grids[spec.name], _, here = self._stored(spec, places, groups)
            elif spec.kind == "seq":
                sequences[spec.name], here = self._sequence(spec, places, groups)
            elif spec.kind == "seq_emb":
                vectors[spec.name], here = self._vectors(spec, places)
            else:
                pixels[spec.name], here = self._pixels(spec, places)
            if not here.all():
                present[spec.name] = here
        return Samples(grids=grids, sequences=sequences, pixels=pixels, vectors=vectors,
                       present=present)

    def _stored(
        self, spec: ModalitySpec, places: np.ndarray, groups: Sequence[tuple[int, np.ndarray]]
    ) -> tuple[Stored, np.ndarray, np.ndarray]:
        """Tokens of (shard, row, crop) [B,3], their lengths [B], and False [B] for holes; `groups`
        are the shards and their samples [n]."""
        begin, length, part = np.empty((3, len(places)), np.int64)
        here, values = np.ones(len(places), bool), []
        for number, (shard, chosen) in enumerate(groups):
            part[chosen] = number
            row, crop = places[chosen, 1], places[chosen, 2]
            column = self._column(shard, spec.name)
            values.append(column.flat.values)
            begin[chosen], length[chosen] = column.flat.find(crop, row)
            if column.valid is not None:
                here[chosen] = column.valid[crop, row]
        return Stored(values, part, begin, spec.max_tokens), length, here

    def _sequence(
        self, spec: ModalitySpec, places: np.ndarray, groups: Sequence[tuple[int, np.ndarray]]
    ) -> tuple[Ragged, np.ndarray]:
        stored, whole, here = self._stored(spec, places, groups)
        # Chunks are shuffled before a sequence is cut, which masking does.
        longest = int(whole.max()) + 1 if spec.chunk else spec.max_tokens
        length = np.minimum(whole + 1, longest) * here
        ids = np.zeros((len(places), max(1, int(length.max()))), np.int64)
        words = np.minimum(whole, length)
        slots = ranges(np.arange(len(ids)) * ids.shape[1], words)
        ids.reshape(-1)[slots] = stored.heads(words)
        ends = np.flatnonzero(whole < length)
        ids[ends, whole[ends]] = EOS_ID
        return (ids, length), here

    def _vectors(
        self, spec: ModalitySpec, places: np.ndarray
    ) -> tuple[Ragged, np.ndarray]:
        tables = [self._table(spec, shard, row) for shard, row, _ in places.tolist()]
        none = np.zeros((0, spec.channels), np.float32)
        here = np.array([table is not None for table in tables])
        return pad_vectors(spec, [none if table is None else table for table in tables]), here

    def _table(self, spec: ModalitySpec, shard: int, row: int) -> np.ndarray | None:
        """Feature vectors [L, C] of one sample, or None for a hole."""
        files = self._shard(shard)
        key, members = files.keys[row], files.members[spec.name]
        if members.ext(key) == MISSING_EXT:
            return None
        return read_vectors(members.read(key), members.ext(key))

    def _pixels(
        self, spec: ModalitySpec, places: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        here = np.ones(len(places), bool)
        patches = np.zeros((len(places), spec.max_tokens, spec.dense_width), np.uint8)
        for i, place in enumerate(map(tuple, places.tolist())):
            found = self._cache.get((spec.name, *place))
            if found is None:
                found = self._picture(spec, *place)
                if found is not None and found.nbytes <= self._room:
                    self._room -= found.nbytes
                    self._cache[spec.name, *place] = found
            here[i] = found is not None
            if found is not None:
                patches[i] = found
        return patches, here

    def _picture(self, spec: ModalitySpec, shard: int, row: int, crop: int) -> np.ndarray | None:
        """Patches of one crop, or None for a hole."""
        files = self._shard(shard)
        key, members = files.keys[row], files.members[spec.name]
        if members.ext(key) == MISSING_EXT:
            return None
        modality = modalities.get(stored_name(spec.name))
        image = modality.decode(members.read(key))
        box = crop_box(self.policy, key, crop, image.shape[1] / image.shape[0])
        side = spec.grid * spec.patch_size
        return patchify(modality.crop(image, box, side)[None], spec.patch_size)[0]

    def _column(self, shard: int, name: str) -> _Column:
        """Tokens of all crops of a shard, found once while it is open."""
        files = self._shard(shard)
        if name not in files.columns:
            reader = files.tokens[name]
            crops = [f"crop{crop}" for crop in range(self.num_crops)]
            valid = np.stack([reader.valid(crop) for crop in crops])
            files.columns[name] = _Column(reader.flat(crops), None if valid.all() else valid)
        return files.columns[name]

    def _shard(self, index: int) -> _Shard:
        """Files of the shard with this index in the split, digested once. Those that were used
        last stay open."""
        files = self._open.pop(index, None) or self._opened(index)
        self._open[index] = files
        if len(self._open) > self._most_open:
            del self._open[next(iter(self._open))]
        return files

    def _opened(self, index: int) -> _Shard:
        number = self.shards[index]
        tokens, members, keys = dict[str, BlockReader](), dict[str, TarIndex](), list[str]()
        for spec in self.specs:
            name = self._stored_as(spec)
            known = self.manifest.sha256(name, number)
            path = self.store.local(self.manifest.path(name, number), known)
            digest = None if index in self._digested else known
            if spec.discrete:
                tokens[spec.name] = BlockReader(path, sha256=digest)
                found = tokens[spec.name].keys
            else:
                members[spec.name] = TarIndex(path, sha256=digest)
                found = members[spec.name].keys
            if keys and found != keys:
                raise ValueError(f"shard {number}: {name} holds other keys than the rest; "
                                 "publish the set again")
            keys = found
        self._digested.add(index)
        return _Shard(tokens, members, keys, {})

    def _check(self, shard: _Shard) -> None:
        for name, reader in shard.tokens.items():
            spec = next(s for s in self.specs if s.name == name)
            column = reader.columns.get("crop0")
            if column is None or (column.length is None) != (spec.kind == "seq"):
                raise ValueError(f"{name}: the token set holds no {spec.kind} column crop0")
            if column.length not in (None, spec.max_tokens):
                raise ValueError(f"{name}: {column.length} tokens a sample are stored, the model "
                                 f"takes {spec.max_tokens}")
            if reader.num_rows and spec.kind == "img":
                highest = int(reader.fixed("crop0")[0].max())
                if highest >= spec.vocab_size:
                    raise ValueError(f"{name}: token {highest} is outside the vocabulary of "
                                     f"{spec.vocab_size}")
