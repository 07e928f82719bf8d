"""Lists of pictures in every usual form, read as one stream of rows in constant memory.

    tsv        no header by default: url<TAB>caption; columns by number from 1, or by header name
    csv        header line, or columns by number
    jsonl      an object a line
    parquet    columns by name
    folder     pictures below a folder, captions in .txt or .json files of the same name
    webdataset tars of pictures with .txt and .json members; a row is a whole tar

Lists are plain or compressed (.gz, .bz2, .zst), and every path may be local or any fsspec URL; a
`*` in a path stands for several files, read in the order of their names. A row that cannot be
used is a row with a `problem`, never an exception: its place in the list, hence its key, stays.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.listing import (
    COMPRESSED,
    PICTURES,
    Format,
    Source,
    detect,
    files_of,
    filesystem,
    is_loop,
)

__all__ = ["MAX_LINE", "NONE", "PICTURES", "Format", "Row", "Source", "detect", "read_rows"]

NONE = "-"
"""Name of a caption column that says: there is none."""
MAX_LINE = 1 << 20
"""Longest line of a list, in characters; longer ones are bad rows."""

_NO_VALUE = (ValueError, KeyError, OverflowError, pa.ArrowException)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a list."""

    url: str
    """Where the picture lies: a URL, or a path below the folder, or a tar."""
    caption: str = ""
    extra: str = ""
    """Further columns as a JSON object, "" for none."""
    problem: str = ""
    """What makes the row unusable, "" for nothing."""
    sidecar: str = ""
    """File beside a picture of a folder that holds its caption, "" for none."""
    text: str = ""
    """What identifies the row: equal lists have equal texts in equal order."""


def read_rows(source: Source, limit: int | None = None) -> Iterator[Row]:
    """The first `limit` rows of a source whose format is known (see `detect`).

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: a column does not exist, or a file is not of the format, with its name.
    """
    readers: dict[str, Callable[[Source], Iterator[Row]]] = {
        "tsv": _tsv, "csv": lambda s: _table(s, _csv_fields, ("url", "caption")), "jsonl": _jsonl,
        "parquet": _parquet, "folder": _folder, "webdataset": _tars,
    }  # fmt: skip
    for number, row in enumerate(readers[source.format](source)):
        if limit is not None and number >= limit:
            return
        yield row


# --- text -------------------------------------------------------------------------------------


@contextmanager
def _text(fs: Any, name: str) -> Iterator[io.TextIOWrapper]:
    """A text file, decompressed as it is read; trouble is a ValueError that names the file."""
    codec = COMPRESSED.get(name.rpartition(".")[2].lower())
    with fs.open(name, "rb") as raw:
        stream = pa.CompressedInputStream(pa.PythonFile(raw, "r"), codec) if codec else raw
        try:
            # Of "utf-8-sig" since Excel begins its files with a mark, which is no part of a name.
            yield io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="\n")
        except (OSError, EOFError) as error:
            raise ValueError(f"{name} cannot be read: {error}") from error


def _lines(fs: Any, name: str) -> Iterator[str]:
    """Lines that hold something, without their ends; a longer one than `MAX_LINE` is cut there."""
    with _text(fs, name) as stream:
        for line in _bounded(stream):
            if line.strip():
                yield line.rstrip("\r\n")


def _bounded(stream: io.TextIOWrapper) -> Iterator[str]:
    """Lines of which no more than `MAX_LINE` characters and one are kept."""
    while line := stream.readline(MAX_LINE + 1):
        rest = line
        while len(rest) > MAX_LINE and not rest.endswith("\n"):
            rest = stream.readline(MAX_LINE + 1)
        yield line


def _tsv(source: Source) -> Iterator[Row]:
    if not source.plain:
        yield from _table(source, _tsv_fields, ("1", "2"))
        return
    for fs, file in files_of(source):
        for line in _lines(fs, file["name"]):
            url, _, caption = line.partition("\t")
            yield _row(url, caption, "", problem=_too_long(line), text=line)


def _too_long(line: str) -> str:
    return f"longer than {MAX_LINE} characters" if len(line) > MAX_LINE else ""


Fields = Iterator[tuple[list[str], str]]
"""Fields of each line, and what is wrong with it."""


def _tsv_fields(fs: Any, name: str) -> Fields:
    for line in _lines(fs, name):
        yield line.split("\t"), _too_long(line)


def _csv_fields(fs: Any, name: str) -> Fields:
    with _text(fs, name) as stream:
        reader = csv.reader(_bounded(stream), strict=True)
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield [], f"line {reader.line_num}: {error}"
                continue
            if fields:
                yield fields, ""


def _table(
    source: Source, fields_of: Callable[[Any, str], Fields], defaults: tuple[str, str]
) -> Iterator[Row]:
    """Rows of a text with columns; without a header where columns are numbers."""
    wanted = _wanted(source, defaults)
    numbers = all(name.isdigit() for name in wanted if name != NONE)
    for fs, file in files_of(source):
        lines = fields_of(fs, file["name"])
        header = None if numbers else next(lines, ([], ""))[0]
        places = [_place(name, header, file["name"]) for name in wanted]
        for fields, problem in lines:
            if not problem and len(fields) <= max(places):
                problem = f"{len(fields)} fields, column {max(places) + 1} is wanted"
            good = not problem
            values = [fields[place] if good and place >= 0 else "" for place in places]
            yield _mapped(source, values, problem)


def _wanted(source: Source, defaults: tuple[str, str]) -> list[str]:
    return [source.url or defaults[0], source.caption or defaults[1], *source.extra]


def _place(name: str, header: list[str] | None, file: str) -> int:
    """Position of a column; -1 for none."""
    if name == NONE:
        return -1
    if header is None:
        if int(name) < 1:
            raise ValueError(f"columns are counted from 1, there is no column {name}")
        return int(name) - 1
    return _known(name, header, file)


def _known(name: str, columns: list[str], file: str) -> int:
    names = [column.strip() for column in columns]
    if name not in names:
        raise ValueError(
            f"{file} has no column {name!r}; it has {', '.join(names) or 'none'}: say which with "
            "url_column and caption_column (by number in a text without a header; '-': no caption)"
        )
    if names.count(name) > 1:
        raise ValueError(f"{file} has {names.count(name)} columns {name!r}; rename one of them")
    return names.index(name)


def _mapped(source: Source, values: list[Any], problem: str = "") -> Row:
    """A row out of the values of its columns: url, caption, further ones."""
    url, caption, *more = values
    extra = "" if problem or not more else _json(dict(zip(source.extra, more, strict=True)))
    return _row(url, caption, extra, problem)


def _row(url: Any, caption: Any, extra: str, problem: str = "", text: str = "") -> Row:
    if not problem and not (isinstance(url, str) and url.strip()):
        problem = f"no URL: {url!r}"
    if not problem and not isinstance(caption, str | None):
        problem = f"the caption is a {type(caption).__name__}, not text"
    if problem:
        url, caption = url if isinstance(url, str) else "", ""
    url, caption, extra = encodable(url), encodable(caption or ""), encodable(extra)
    text = text or _json([url, caption, extra, problem])
    return Row(url.strip(), caption, extra, problem, text=text)


def encodable(text: str) -> str:
    """Text without what JSON may escape and no file can hold: halves of characters."""
    return text.encode("utf-8", "replace").decode()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _jsonl(source: Source) -> Iterator[Row]:
    wanted = _wanted(source, ("url", "caption"))
    for fs, file in files_of(source):
        checked = False
        for line in _lines(fs, file["name"]):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                value, why = None, str(error)
            else:
                why = "not an object"
            if not isinstance(value, dict):
                yield _mapped(source, ["", ""], _too_long(line) or f"not JSON: {why}"[:200])
                continue
            if not checked:  # a wrong name is an error, a gap in a later row is that row's
                for name in wanted:
                    if name != NONE:
                        _known(name, list(value), file["name"])
                checked = True
            yield _mapped(source, [value.get(name) for name in wanted])


# --- parquet, folders, tars -------------------------------------------------------------------


def _parquet(source: Source) -> Iterator[Row]:
    wanted = _wanted(source, ("url", "caption"))
    columns = list(dict.fromkeys(name for name in wanted if name != NONE))
    for fs, file in files_of(source):
        with _whole(fs, file["name"]) as raw:
            try:
                table = pq.ParquetFile(raw, pre_buffer=False)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{file['name']} is not a Parquet file: {error}") from error
            for name in columns:
                _known(name, table.schema_arrow.names, file["name"])
            try:
                batches = table.iter_batches(1024, columns=columns, use_threads=False)
                for batch in batches:
                    for value in _records(batch):
                        if isinstance(value, str):
                            yield _mapped(source, ["", ""], value)
                        else:
                            yield _mapped(source, [value.get(name) for name in wanted])
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{file['name']} cannot be read: {error}") from error


@contextmanager
def _whole(fs: Any, name: str) -> Iterator[Any]:
    """A file that can be read from anywhere; one that is compressed is unpacked on the disk."""
    with fs.open(name, "rb") as raw, tempfile.TemporaryFile() as unpacked:
        codec = COMPRESSED.get(name.rpartition(".")[2].lower())
        if codec is None:
            yield raw
            return
        try:
            shutil.copyfileobj(pa.CompressedInputStream(pa.PythonFile(raw, "r"), codec), unpacked)
        except (OSError, EOFError) as error:
            raise ValueError(f"{name} cannot be read: {error}") from error
        yield unpacked


def _records(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | str]:
    """Rows of a batch; of one that cannot be read, the reason."""
    try:
        yield from batch.to_pylist()
    except _NO_VALUE:
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield f"not UTF-8: {error.reason}"
            except _NO_VALUE as error:  # as of a day that no calendar has, or an unknown time zone
                yield f"no value: {error}"[:200]


def _folder(source: Source) -> Iterator[Row]:
    """Pictures in the order of their paths; those of a folder before those of its subfolders."""
    fs, root = filesystem(source.path)
    if not fs.isdir(root):
        raise FileNotFoundError(f"{source.path} is no folder")
    yield from _pictures(fs, root.rstrip("/"), "")


def _pictures(fs: Any, root: str, folder: str) -> Iterator[Row]:
    entries = {
        entry["name"].rstrip("/").rpartition("/")[2]: entry
        for entry in fs.ls(f"{root}/{folder}".rstrip("/"), detail=True)
        if not is_loop(fs, entry)
    }
    for name in sorted(entries):
        stem, _, extension = name.rpartition(".")
        if name.startswith(".") or entries[name]["type"] == "directory":
            continue
        if extension.lower() in PICTURES:
            beside = [f"{stem}.{ext}" for ext in ("txt", "json") if f"{stem}.{ext}" in entries]
            sidecar = f"{folder}{beside[0]}" if beside else ""
            path = encodable(f"{folder}{name}")
            problem = "" if path == f"{folder}{name}" else "the name is not UTF-8"
            text = _json([path, entries[name].get("size"), sidecar])
            yield Row(path, problem=problem, sidecar="" if problem else sidecar, text=text)
    for name in sorted(entries):
        if entries[name]["type"] == "directory" and name and not name.startswith("."):
            yield from _pictures(fs, root, f"{folder}{name}/")


def _tars(source: Source) -> Iterator[Row]:
    for fs, file in files_of(source):
        name = file["name"]
        short = name.rpartition("/")[2]
        size = file["size"] if "size" in file else fs.info(name).get("size")
        yield Row(fs.unstrip_protocol(name), text=_json([short, size]))
