"""How a dataset looks to others: three layouts of the same parts, each read back to equal bytes.

    ml-4m        <part>/shard-00000.tar for each part, as the released 4M code reads them: tokens
                 `.npy` int16 [crops, tokens], `crop_settings` int64 [crops, 5], boxes as "boxes"
    webdataset   shard-00000.tar with every part of a sample: key.jpg, key.txt, key.depth.png, ...
    parquet      shard-00000.parquet with a row for each sample and a column for each part

A *part* is either a file for each sample or tokens for each sample: `rgb`, `caption`, `depth`,
`tok_depth`. Sequences have both: `caption` is the text, `ids_caption` its tokens.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from infra.blocks import BlockReader, BlockWriter, Column
from infra.shards import MISSING_EXT, read_tar, split_name, write_tar
from infra.store import Store
from infra.strict import read_json, read_npy
from infra.tables import read_table
from models.crops import CropPolicy, crop_box

LayoutName = Literal["ml-4m", "webdataset", "parquet"]
LAYOUTS: tuple[LayoutName, ...] = ("ml-4m", "webdataset", "parquet")
CROPS = "crop_settings"
MAX_INT16 = np.iinfo(np.int16).max

File = tuple[str, bytes]
"""Extension and bytes of a sample's file; the extension of a hole is `MISSING_EXT`."""
Row = list[np.ndarray] | None
"""Tokens of each crop; None for a hole."""


@dataclass(frozen=True)
class Part:
    """What is exported under one name."""

    name: str
    modality: str
    """Name of the output that it was, and will be."""
    columns: tuple[tuple[str, str, int | None], ...] = ()
    """Of tokens: name, dtype and length of each crop's column; of files: none."""
    metadata: tuple[tuple[str, str], ...] = ()
    """Of tokens: what their blocks carry."""

    @property
    def is_tokens(self) -> bool:
        return bool(self.columns)

    @property
    def is_dense(self) -> bool:
        """Whether all samples have equally many tokens."""
        return self.is_tokens and all(length is not None for _, _, length in self.columns)

    def to_dict(self) -> dict[str, Any]:
        """JSON value that `from_dict` turns into an equal part."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Part:
        columns = tuple((name, dtype, length) for name, dtype, length in value["columns"])
        metadata = tuple((key, text) for key, text in value["metadata"])
        return cls(value["name"], value["modality"], columns, metadata)


@dataclass
class Shard:
    """One shard in memory: every part has a value for each key, in their order."""

    keys: list[str]
    files: dict[str, list[File]] = field(default_factory=dict)
    tokens: dict[str, list[Row]] = field(default_factory=dict)

    def holes(self) -> set[int]:
        """Rows that lack at least one part."""
        found = {i for files in self.files.values() for i, f in enumerate(files) if _is_hole(f)}
        return found | {i for rows in self.tokens.values() for i, r in enumerate(rows) if r is None}

    def without(self, rows: set[int]) -> Shard:
        """The shard less some rows."""
        kept = [row for row in range(len(self.keys)) if row not in rows]
        return Shard(
            [self.keys[row] for row in kept],
            {name: [files[row] for row in kept] for name, files in self.files.items()},
            {name: [tokens[row] for row in kept] for name, tokens in self.tokens.items()},
        )


def _is_hole(file: File) -> bool:
    return file[0] == MISSING_EXT


# --- between our tars and memory --------------------------------------------------------------


def load_files(tar: bytes, source: str) -> tuple[list[str], list[File]]:
    """Keys and files of a tar of labels. Raises TornShard for a damaged one."""
    members = [(*split_name(name), data) for name, data in read_tar(tar, source=source)]
    return [key for key, _, _ in members], [(ext, data) for _, ext, data in members]


def load_tokens(reader: BlockReader) -> tuple[list[str], list[Row]]:
    """Keys and tokens of a token shard."""
    columns = [list(_column(reader, name)) for name in reader.columns]
    rows: list[Row] = []
    for number, crops in enumerate(zip(*columns, strict=True)):
        present = [crop for crop in crops if crop is not None]
        if len(present) not in (0, len(crops)):
            raise ValueError(f"{reader.path}: {reader.keys[number]} has only some of its crops")
        rows.append(present or None)
    return reader.keys, rows


def _column(reader: BlockReader, name: str) -> Iterator[np.ndarray | None]:
    if reader.columns[name].length is not None:
        values, valid = reader.fixed(name)
        yield from (value if ok else None for value, ok in zip(values, valid, strict=True))
        return
    flat, offsets, valid = reader.ragged_arrays(name)
    for row, ok in enumerate(valid):
        yield flat[offsets[row] : offsets[row + 1]] if ok else None


def token_part(name: str, modality: str, reader: BlockReader) -> Part:
    """What is to be known of a token shard to write it again."""
    columns = tuple((c, column.dtype, column.length) for c, column in reader.columns.items())
    return Part(name, modality, columns, tuple(sorted(reader.metadata.items())))


def to_tar(part: Part, shard: Shard) -> bytes:
    """The tar of a part as our store holds it; equal parts give equal bytes."""
    if not part.is_tokens:
        files = zip(shard.keys, shard.files[part.name], strict=True)
        return write_tar((f"{key}.{ext}", data) for key, (ext, data) in files)
    columns = {name: Column(dtype, length) for name, dtype, length in part.columns}
    writer = BlockWriter(columns, dict(part.metadata))
    for key, row in zip(shard.keys, shard.tokens[part.name], strict=True):
        crops: Sequence[np.ndarray | None] = row if row is not None else [None] * len(columns)
        writer.add(key, dict(zip(columns, crops, strict=True)))
    return writer.finish()


# --- between memory and the layouts -----------------------------------------------------------


def write_shard(
    layout: LayoutName, out: Store, number: int, parts: Sequence[Part], shard: Shard,
    crops: CropPolicy | None,
) -> None:
    """Put one shard in a layout.

    Args:
        number: its place in the exported set, from 0.
        crops: windows of the tokens, which ml-4m stores beside them.

    Raises:
        ValueError: tokens do not fit the layout's int16.
    """
    if layout == "parquet":
        out.write(f"{_stem(number)}.parquet", _to_parquet(parts, shard))
    elif layout == "webdataset":
        out.write(f"{_stem(number)}.tar", write_tar(_wds_members(parts, shard)))
    else:
        for part in parts:
            members = zip(shard.keys, _ml4m_files(part, shard), strict=True)
            tar = write_tar((f"{key}.{ext}", data) for key, (ext, data) in members)
            out.write(f"{part.name}/{_stem(number)}.tar", tar)
        if crops is not None and "rgb" in shard.files:
            windows = zip(shard.keys, crop_settings(shard, crops), strict=True)
            tar = write_tar((f"{key}.npy", npy(value)) for key, value in windows)
            out.write(f"{CROPS}/{_stem(number)}.tar", tar)


def read_shard(layout: LayoutName, source: Store, number: int, parts: Sequence[Part]) -> Shard:
    """A shard of a set in a layout.

    Raises:
        TornShard: a file is damaged.
        ValueError: parts disagree about the keys, or a member is not what it should be.
    """
    if layout == "parquet":
        path = f"{_stem(number)}.parquet"
        return _from_parquet(source.read(path), source.full(path), parts)
    if layout == "webdataset":
        path = f"{_stem(number)}.tar"
        return _from_wds(source.read(path), source.full(path), parts)
    found: Shard | None = None
    for part in parts:
        path = f"{part.name}/{_stem(number)}.tar"
        keys, files = load_files(source.read(path), source.full(path))
        found = found or Shard(keys)
        if keys != found.keys:
            raise ValueError(f"{source.full(path)} holds other keys than {parts[0].name}")
        _take_ml4m(part, files, found, source.full(path))
    return found or Shard([])


def _stem(number: int) -> str:
    return f"shard-{number:05d}"


def npy(array: np.ndarray) -> bytes:
    """An array as `.npy`, never pickled."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def crop_settings(shard: Shard, policy: CropPolicy) -> Iterator[np.ndarray]:
    """int64 [crops, 5] of each sample: top, left, height, width, hflip in pixels of its rgb."""
    for key, (_, data) in zip(shard.keys, shard.files["rgb"], strict=True):
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            width, height = image.size
        rows = []
        for index in range(policy.num_crops):
            box = crop_box(policy, key, index, width / height)
            left, top, right, bottom = (round(edge) for edge in box.pixels(height, width))
            rows.append((top, left, bottom - top, right - left, int(box.hflip)))
        yield np.array(rows, np.int64)


def _ml4m_files(part: Part, shard: Shard) -> Iterator[File]:
    if part.is_tokens:
        for row in shard.tokens[part.name]:
            assert row is not None, "ml-4m has no holes; the caller leaves such samples out"
            if part.is_dense and max(int(crop.max()) for crop in row) > MAX_INT16:
                raise ValueError(f"{part.name} has tokens above {MAX_INT16}: ml-4m stores int16")
            yield _token_file(row, np.int16 if part.is_dense else None)
        return
    for ext, data in shard.files[part.name]:
        if part.name == "det":
            data = _renamed(data, "box", "boxes", part.name)
        yield ext, data


def _take_ml4m(part: Part, files: list[File], shard: Shard, source: str) -> None:
    named = [(f"{source}: {key}", *file) for key, file in zip(shard.keys, files, strict=True)]
    if part.is_tokens:
        shard.tokens[part.name] = [_tokens_of(part, (ext, data), what) for what, ext, data in named]
    elif part.name == "det":
        shard.files["det"] = [(e, _renamed(data, "boxes", "box", what)) for what, e, data in named]
    else:
        shard.files[part.name] = files


def _renamed(data: bytes, old: str, new: str, what: str) -> bytes:
    """Boxes under the other name; JSON as our own modality writes it."""
    try:
        value = read_json(data)
        for instance in value["instances"]:
            if old in instance:
                instance[new] = instance.pop(old)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{what} is no file of boxes: {error!r}") from error
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _token_file(row: list[np.ndarray], dtype: Any = None) -> File:
    """Tokens of a sample: `.npy` [crops, tokens], or `.json` where crops differ in length."""
    if len({len(crop) for crop in row}) == 1 and dtype is not None:
        return "npy", npy(np.stack(row).astype(dtype))
    return "json", json.dumps([crop.tolist() for crop in row], separators=(",", ":")).encode()


def _tokens_of(part: Part, file: File, what: str) -> Row:
    ext, data = file
    if ext == MISSING_EXT:
        return None
    if ext == "npy":
        array = read_npy(data, what)
        return _row(part, list(array) if array.ndim == 2 else None, what)
    try:
        return _row(part, read_json(data), what)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _row(part: Part, crops: Any, what: str) -> list[np.ndarray]:
    """Tokens of a sample's crops in their dtypes.

    Raises:
        ValueError: they are other than whole numbers, or do not fit: cast they would be others.
    """
    if not isinstance(crops, list) or len(crops) != len(part.columns):
        raise ValueError(f"{what} has not the {len(part.columns)} crops of its set")
    row = []
    for crop, (_, dtype, _) in zip(crops, part.columns, strict=True):
        array = np.asarray(crop)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(f"{what} holds {array.dtype} {array.shape}, not a list of tokens")
        if np.min(array, initial=0) < 0:
            raise ValueError(f"{what} has negative tokens: more codes than its int16 can hold")
        if np.max(array, initial=0) > np.iinfo(dtype).max:
            raise ValueError(f"{what} has tokens outside {dtype}")
        row.append(array.astype(dtype))
    return row


_PLAIN = {"rgb": ("jpg", "png"), "caption": ("txt",)}
"""Parts that any reader knows by their extension alone."""


def _wds_members(parts: Sequence[Part], shard: Shard) -> Iterator[tuple[str, bytes]]:
    for row, key in enumerate(shard.keys):
        for part in parts:
            if part.is_tokens:
                tokens = shard.tokens[part.name][row]
                dtype = part.columns[0][1] if part.is_dense else None
                ext, data = (MISSING_EXT, b"") if tokens is None else _token_file(tokens, dtype)
            else:
                ext, data = shard.files[part.name][row]
            plain = ext in _PLAIN.get(part.name, ()) and not part.is_tokens
            yield (f"{key}.{ext}" if plain else f"{key}.{part.name}.{ext}"), data


def _from_wds(tar: bytes, source: str, parts: Sequence[Part]) -> Shard:
    samples: dict[str, dict[str, File]] = {}
    for name, data in read_tar(tar, source=source):
        key, extension = split_name(name)
        owner, dot, ext = extension.partition(".")
        if not dot:
            owner, ext = ("caption" if owner in _PLAIN["caption"] else "rgb"), owner
        samples.setdefault(key, {})[owner] = (ext, data)
    shard = Shard(list(samples))
    for part in parts:
        for key, sample in samples.items():
            if part.name not in sample:
                raise ValueError(f"{source}: {key} lacks {part.name}")
        files = [sample[part.name] for sample in samples.values()]
        if part.is_tokens:
            shard.tokens[part.name] = [
                _tokens_of(part, file, f"{source}: {part.name} of {key}")
                for key, file in zip(shard.keys, files, strict=True)
            ]
        else:
            shard.files[part.name] = files
    return shard


def _to_parquet(parts: Sequence[Part], shard: Shard) -> bytes:
    columns: dict[str, pa.Array] = {"key": pa.array(shard.keys, pa.string())}
    for part in parts:
        if part.is_tokens:
            item = pa.type_for_alias(part.columns[0][1])
            rows = [
                None if row is None else [crop.tolist() for crop in row]
                for row in shard.tokens[part.name]
            ]
            columns[part.name] = pa.array(rows, pa.list_(pa.list_(item)))
            continue
        files = shard.files[part.name]
        columns[part.name] = pa.array([data for _, data in files], pa.binary())
        columns[f"{part.name}.ext"] = pa.array([ext for ext, _ in files], pa.string())
    sink = pa.BufferOutputStream()
    # Small groups: a reader that takes one column of a few rows reads no more than those.
    pq.write_table(pa.table(columns), sink, compression="zstd", row_group_size=256)
    return sink.getvalue().to_pybytes()


def _from_parquet(data: bytes, source: str, parts: Sequence[Part]) -> Shard:
    try:
        table = read_table(data)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{source} is not a Parquet file: {error}") from error
    shard = Shard(_values(table, "key", pa.types.is_string, source))
    for part in parts:
        if part.is_tokens:
            rows = zip(shard.keys, _values(table, part.name, pa.types.is_list, source), strict=True)
            shard.tokens[part.name] = [
                None if row is None else _row(part, row, f"{source}: {part.name} of {key}")
                for key, row in rows
            ]
        else:
            exts = _values(table, f"{part.name}.ext", pa.types.is_string, source)
            files = _values(table, part.name, pa.types.is_binary, source)
            shard.files[part.name] = list(zip(exts, files, strict=True))
    return shard


def _values(table: pa.Table, name: str, fits: Callable[[Any], bool], source: str) -> list[Any]:
    """A column of an export. Raises ValueError where it is none, of its type and without gaps."""
    if table.column_names.count(name) != 1:
        raise ValueError(f"{source} has {table.column_names.count(name)} columns {name!r}")
    column = table[name]
    # A gap among tokens is a hole.
    if not fits(column.type) or (column.null_count and not pa.types.is_list(column.type)):
        raise ValueError(f"{source}: column {name!r} is {column.type}, or has gaps")
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError, KeyError) as error:  # as of texts that are not UTF-8
        raise ValueError(f"{source}: column {name!r}: {error}") from error
