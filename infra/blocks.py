"""Token shards: tars whose members are Arrow IPC files of 256 samples each.

One `.npy` member for each sample costs 1,024 bytes or more for 128 bytes of tokens, and a header
to parse for each read. A block stores them as columns (`key`, then one column for each crop):
about 1.01x the raw size, memory-mapped, and read as numpy views without a copy. Members start on
512-byte boundaries, so that Arrow's own 8-byte alignment holds inside the map.

A column of dense tokens is a fixed-size list, one of sequences a variable-size list; a hole is an
Arrow null, counted and never shifted.

>>> writer = BlockWriter({"crop0": Column("uint16", 2)}, {"tokenizer": "depth@1a2b3c4d"})
>>> writer.add("00000000000", {"crop0": [7, 9]})
>>> reader = BlockReader(path_of(writer.finish()))
>>> reader.fixed_rows("crop0", [0])
array([[7, 9]], dtype=uint16)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from infra.flat import Flat, joined
from infra.shards import Member, TornShard, check_sha256, map_file, scan_tar, write_tar

BLOCK_SIZE = 256
_PREFIX, _SUFFIX = "block-", ".arrow"

Tokens = np.ndarray | Sequence[int]


@dataclass(frozen=True, slots=True)
class Column:
    """What one column holds for each sample.

    Args:
        dtype: "uint16" or "uint32".
        length: tokens of every sample, at least 1; None when it varies.
    """

    dtype: str
    length: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("uint16", "uint32"):
            raise ValueError(f"column dtype {self.dtype!r}; choose uint16 or uint32")
        if self.length is not None and self.length < 1:
            raise ValueError(f"column length {self.length}; it must be at least 1, or None")

    @property
    def arrow(self) -> pa.DataType:
        """The Arrow list type."""
        item = pa.field("item", pa.type_for_alias(self.dtype), nullable=False)
        return pa.list_(item) if self.length is None else pa.list_(item, self.length)

    @classmethod
    def of(cls, kind: pa.DataType) -> Column:
        """The column that an Arrow type stands for. Raises ValueError for any other type."""
        if pa.types.is_fixed_size_list(kind):
            return cls(str(kind.value_type), kind.list_size)
        if pa.types.is_list(kind):
            return cls(str(kind.value_type))
        raise ValueError(f"{kind} is not a column of tokens")


def is_blocks(members: Sequence[Member]) -> bool:
    """Whether an archive is a token shard, by the names of its members."""
    return bool(members) and all(
        m.name.startswith(_PREFIX) and m.name.endswith(_SUFFIX) for m in members
    )


class BlockWriter:
    """Collects samples and returns the tar; the same samples give the same bytes.

    Args:
        columns: name -> what it holds; by convention "crop0", "crop1", ...
        metadata: strings for the schema, e.g. the tokenizer's fingerprint.
        block_size: samples in a block.
    """

    def __init__(
        self,
        columns: Mapping[str, Column],
        metadata: Mapping[str, str],
        block_size: int = BLOCK_SIZE,
    ) -> None:
        if not columns or "key" in columns or block_size < 1:
            raise ValueError('give at least one column, none named "key", and a block size >= 1')
        self._columns = dict(columns)
        fields = [pa.field("key", pa.string(), nullable=False)]
        fields += [pa.field(name, column.arrow) for name, column in columns.items()]
        self._schema = pa.schema(fields, metadata={k: metadata[k] for k in sorted(metadata)})
        self._block_size = block_size
        self._seen: set[str] = set()
        self._keys: list[str] = []
        self._rows: dict[str, list[np.ndarray | None]] = {name: [] for name in columns}
        self._members: list[tuple[str, bytes]] = []

    def add(self, key: str, row: Mapping[str, Tokens | None]) -> None:
        """Appends a sample.

        Args:
            row: for each column, tokens [length] or None for a hole.

        Raises:
            ValueError: the key was added before, a column is missing or unknown, or tokens have
                another length or do not fit the column's dtype.
        """
        if key in self._seen:
            raise ValueError(f"key {key} is added twice")
        if row.keys() != self._columns.keys():
            raise ValueError(f"{key}: columns {sorted(row)}, expected {sorted(self._columns)}")
        tokens = {name: self._tokens(key, name, value) for name, value in row.items()}
        self._seen.add(key)
        self._keys.append(key)
        for name, value in tokens.items():
            self._rows[name].append(value)
        if len(self._keys) == self._block_size:
            self._flush()

    def finish(self) -> bytes:
        """The tar. An empty shard is one block without rows, so that its schema survives."""
        if self._keys or not self._members:
            self._flush()
        return write_tar(self._members)

    def _tokens(self, key: str, name: str, value: Tokens | None) -> np.ndarray | None:
        column = self._columns[name]
        if value is None:
            return None
        array = np.asarray(value)
        if array.size == 0 and array.ndim == 1:
            array = array.astype(column.dtype)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"{key}: {name} is {array.dtype} {array.shape}, not a list of tokens")
        if column.length not in (None, len(array)):
            raise ValueError(f"{key}: {name} has {len(array)} tokens, not {column.length}")
        if array.size and (array.min() < 0 or array.max() > np.iinfo(column.dtype).max):
            raise ValueError(f"{key}: {name} has tokens outside {column.dtype}")
        return array.astype(column.dtype, copy=True)

    def _flush(self) -> None:
        arrays = [pa.array(self._keys, pa.string())]
        arrays += [_arrow(self._columns[name], rows) for name, rows in self._rows.items()]
        batch = pa.record_batch(arrays, schema=self._schema)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, self._schema) as writer:
            writer.write_batch(batch)
        name = f"{_PREFIX}{len(self._members):05d}{_SUFFIX}"
        self._members.append((name, sink.getvalue().to_pybytes()))
        self._keys = []
        self._rows = {name: [] for name in self._columns}


def _arrow(column: Column, rows: list[np.ndarray | None]) -> pa.Array:
    holes = np.array([row is None for row in rows], bool)
    mask = pa.array(holes, pa.bool_()) if holes.any() else None
    # A hole of a fixed column still takes its place, with zeros; one of a ragged column is empty.
    filler = np.zeros(column.length or 0, column.dtype)
    filled = [filler if row is None else row for row in rows]
    values = pa.array(np.concatenate([np.zeros(0, column.dtype), *filled]))
    if column.length is not None:
        return pa.FixedSizeListArray.from_arrays(values, type=column.arrow, mask=mask)
    offsets = np.cumsum([0, *map(len, filled)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=column.arrow, mask=mask)


class BlockReader:
    """A memory-mapped token shard. Picklable: the map is opened again where it arrives.

    Args:
        path: the tar.
        sha256: expected hex digest of the file; without it, a bit flipped inside the tokens goes
            unseen (structure is always checked).

    Raises:
        TornShard: truncated, altered, or blocks that disagree about columns or metadata.
    """

    def __init__(self, path: str | Path, *, sha256: str | None = None) -> None:
        self.path = Path(path)
        self._sha256 = sha256
        data = map_file(path)
        check_sha256(data, sha256, str(path))
        self._load(pa.py_buffer(data), scan_tar(data, str(path)))

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "token shard") -> BlockReader:
        """A reader of a tar in memory. Raises TornShard as above."""
        reader = cls.__new__(cls)
        reader.path, reader._sha256 = Path(source), None
        reader._load(pa.py_buffer(data), scan_tar(data, source))
        return reader

    def _load(self, buffer: pa.Buffer, members: list[Member]) -> None:
        if not is_blocks(members):
            raise TornShard(f"{self.path}: not a token shard")
        self._buffer = buffer
        self._batches = [self._open(buffer, member) for member in members]
        schema = self._batches[0].schema
        if any(not b.schema.equals(schema, check_metadata=True) for b in self._batches):
            raise TornShard(f"{self.path}: blocks differ in columns or metadata")
        try:  # also of names and metadata that are not UTF-8, a kind of ValueError
            self.columns = {f.name: Column.of(f.type) for f in schema if f.name != "key"}
            self.metadata = {k.decode(): v.decode() for k, v in (schema.metadata or {}).items()}
            first = schema.field(0)
        except (ValueError, IndexError) as error:
            raise TornShard(f"{self.path}: {error}") from error
        if first.name != "key" or first.type != pa.string():
            raise TornShard(f"{self.path}: the first column is not the key")
        self._starts = np.cumsum([0, *(b.num_rows for b in self._batches)])
        self.num_rows = int(self._starts[-1])
        self._views: dict[str, list[np.ndarray]] = {}

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.path, self._sha256)

    def __len__(self) -> int:
        return self.num_rows

    def _open(self, buffer: pa.Buffer, member: Member) -> pa.RecordBatch:
        try:
            file = pa.ipc.open_file(buffer.slice(member.offset, member.size))
            if file.num_record_batches != 1:
                raise ValueError("other than one batch")
            batch = file.get_batch(0)
            if len(set(batch.schema.names)) < len(batch.schema.names):
                raise ValueError("two columns of one name")
            batch.validate(full=True)  # offsets that point outside would crash the process
        except (pa.ArrowException, ValueError, OSError) as error:
            raise TornShard(f"{self.path}: {member.name}: {error}") from error
        return batch

    @cached_property
    def keys(self) -> list[str]:
        """Keys of the samples, in order."""
        return [key for batch in self._batches for key in batch.column(0).to_pylist()]

    def valid(self, column: str) -> np.ndarray:
        """bool [num_rows], False for holes."""
        self._kind(column)
        parts = [b.column(column).is_valid().to_numpy(False) for b in self._batches]
        return np.concatenate(parts)

    def fixed(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [num_rows, length] of a dense column (zeros for holes), and `valid`.

        Zero-copy for a shard of one block, one copy otherwise; see `fixed_rows` for less.
        """
        views = self._fixed_views(column)
        return (views[0] if len(views) == 1 else np.concatenate(views)), self.valid(column)

    def fixed_rows(self, column: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Tokens [len(rows), length] of the given rows of a dense column (zeros for holes).

        Touches only the pages of those rows.

        Raises:
            IndexError: a row outside 0..num_rows-1.
        """
        views, rows = self._fixed_views(column), np.asarray(rows, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.num_rows):
            raise IndexError(f"{self.path}: rows outside 0..{self.num_rows - 1}")
        if len(views) == 1:
            return views[0][rows]
        blocks = np.searchsorted(self._starts, rows, side="right") - 1
        out = np.empty((len(rows), views[0].shape[1]), views[0].dtype)
        for block in np.unique(blocks):
            chosen = blocks == block
            out[chosen] = views[block][rows[chosen] - self._starts[block]]
        return out

    def ragged(self, column: str, row: int) -> np.ndarray:
        """Tokens [n] of one row of a column of sequences; empty for a hole (see `valid`).

        Raises:
            IndexError: a row outside 0..num_rows-1.
        """
        if not 0 <= row < self.num_rows:
            raise IndexError(f"{self.path}: row {row} outside 0..{self.num_rows - 1}")
        views = self._ragged_views(column)
        block = int(np.searchsorted(self._starts, row, side="right")) - 1
        values, offsets = views[2 * block], views[2 * block + 1]
        at = row - int(self._starts[block])
        return values[offsets[at] : offsets[at + 1]]

    def ragged_arrays(self, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A whole column of sequences.

        Returns:
            values [total], offsets int64 [num_rows + 1], valid bool [num_rows]; row i is
            values[offsets[i]:offsets[i + 1]].
        """
        views = self._ragged_views(column)
        lengths = np.concatenate([np.diff(offsets) for offsets in views[1::2]])
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return np.concatenate(views[0::2]), offsets, self.valid(column)

    def flat(self, columns: Sequence[str]) -> Flat:
        """Several columns of one kind as one array without a copy, for reading tokens of many rows
        and columns at once."""
        kinds = {self._kind(column) for column in columns}
        if len(kinds) != 1:
            raise ValueError(f"{self.path}: {', '.join(columns)} are not of one kind")
        length = kinds.pop().length
        if length is not None:
            views = [view.reshape(-1) for name in columns for view in self._fixed_views(name)]
            return Flat(*joined(views, self._buffer), self._starts[:-1], length)
        views = [view for name in columns for view in self._ragged_views(name)]
        return Flat(*joined(views[0::2], self._buffer), self._starts[:-1],
                    joined(views[1::2], self._buffer))

    def _kind(self, column: str) -> Column:
        if column not in self.columns:
            raise ValueError(f"{self.path}: no column {column!r}, only {sorted(self.columns)}")
        return self.columns[column]

    def _fixed_views(self, column: str) -> list[np.ndarray]:
        if column not in self._views:
            length = self._kind(column).length
            if length is None:
                raise ValueError(f"{self.path}: {column} holds sequences; use ragged()")
            arrays = [batch.column(column).values for batch in self._batches]
            self._views[column] = [a.to_numpy().reshape(-1, length) for a in arrays]
        return self._views[column]

    def _ragged_views(self, column: str) -> list[np.ndarray]:
        """Values and offsets of every block, interleaved."""
        if column not in self._views:
            if self._kind(column).length is not None:
                raise ValueError(f"{self.path}: {column} holds dense tokens; use fixed()")
            arrays = [batch.column(column) for batch in self._batches]
            self._views[column] = [
                part.to_numpy() for array in arrays for part in (array.values, array.offsets)
            ]
        return self._views[column]


def _reopen(path: Path, sha256: str | None) -> BlockReader:
    return BlockReader(path, sha256=sha256)
