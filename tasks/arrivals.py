"""Where the bytes of planned rows come from: the web, a folder of files, or tars of others.

Each way in yields one :class:`~infra.download.Download` for each wanted row, whatever happens;
files and tars fill in the caption and the further columns that lie beside a picture.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import fsspec

from infra.download import Download
from infra.shards import Member, map_file, scan_tar, split_name
from infra.sources import PICTURES, encodable

MAX_SIDECAR = 1 << 20
"""Longest caption file that is read, in bytes."""
MAX_ROWS = 99_999
"""Most pictures of one tar: keys have five digits for the row."""
UNREADABLE = "unreadable"
"""Reason class of a file that is not there or cannot be read."""

_AT_ONCE = 16


async def from_files(
    base: str, rows: list[dict[str, Any]], wanted: Sequence[int], max_bytes: int
) -> AsyncIterator[Download]:
    """Pictures below a folder, in any order; `index` counts within `wanted`.

    Args:
        base: the folder, a path or an fsspec URL.
        rows: planned rows; those with a sidecar get their caption and further columns from it.
        wanted: positions of the rows to read.
        max_bytes: longest file that is taken.
    """
    fs, root = fsspec.core.url_to_fs(base)
    loop = asyncio.get_running_loop()
    rest = iter(enumerate(wanted))
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="files") as pool:
        pending: set[asyncio.Future[Download]] = set()
        while True:
            # No more than are taken: files that wait occupy memory.
            for index, row in islice(rest, 2 * _AT_ONCE - len(pending)):
                pending.add(
                    loop.run_in_executor(
                        pool, _from_file, fs, root.rstrip("/"), index, rows[row], max_bytes
                    )
                )
            if not pending:
                return
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for read in done:
                yield read.result()


def _from_file(
    fs: Any, root: str, index: int, row: dict[str, Any], max_bytes: int
) -> Download:
    try:
        body = fs.cat_file(f"{root}/{row['url']}", start=0, end=max_bytes + 1)
        if row["sidecar"]:
            data = fs.cat_file(f"{root}/{row['sidecar']}", start=0, end=MAX_SIDECAR + 1)
            _tell(row, row["sidecar"], data)
    except OSError as error:
        return Download(index, UNREADABLE, str(error))
    except ValueError as error:
        return Download(index, "bad_row", f"{row['sidecar']}: {error}")
    if len(body) > max_bytes:
        return Download(index, "too_large", f"more than {max_bytes} bytes")
    return Download(index, "ok", body=body)


def _tell(row: dict[str, Any], name: str, data: bytes) -> None:
    """Take caption and further columns from a file beside a picture."""
    if len(data) > MAX_SIDECAR:
        raise ValueError(f"longer than {MAX_SIDECAR} bytes")
    if not name.lower().endswith(".json"):
        row["caption"] = data.decode("utf-8-sig", "replace")  # Notepad begins files with a mark
        return
    try:
        value = json.loads(data)
    except RecursionError:
        value = None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    caption = next((value[n] for n in ("caption", "text") if isinstance(value.get(n), str)), "")
    # A text file beside it goes first.
    row["caption"] = row["caption"] or encodable(caption)
    extra = json.dumps({**value, **json.loads(row["extra"] or "{}")}, ensure_ascii=False)
    row["extra"] = encodable(extra)


def from_tar(path: str, max_bytes: int) -> tuple[list[dict[str, Any]], Iterator[Download]]:
    """Rows of a WebDataset tar in its order, and their pictures, read one at a time.

    A sample has one picture and, as far as they are there, a `.txt` caption and a `.json` with
    further columns; its key in the tar becomes the column `__key__`. A tar that is not on this
    machine is copied into a temporary file meanwhile, so that memory does not grow with it.

    Raises:
        TornShard: the tar is truncated or damaged, or another file.
        ValueError: it holds more samples than a shard may.
    """
    data = _mapped(path)
    samples: dict[str, list[tuple[str, Member]]] = {}
    for member in scan_tar(data, path):
        key, extension = split_name(member.name)
        samples.setdefault(key, []).append((extension.lower(), member))
    if len(samples) > MAX_ROWS:
        raise ValueError(f"{path} holds {len(samples)} samples, a shard at most {MAX_ROWS}")
    rows: list[dict[str, Any]] = []
    found: list[Member | tuple[str, str]] = []
    for key, members in samples.items():
        row = {"url": f"{path}#{key}", "caption": "", "extra": json.dumps({"__key__": key})}
        rows.append(row)
        found.append(_sample(data, row, key, members, max_bytes))
    return rows, _pictures(data, found)


def _mapped(path: str) -> mmap.mmap:
    fs, name = fsspec.core.url_to_fs(path)
    if "file" in fs.protocol:
        return map_file(name)
    with tempfile.NamedTemporaryFile(suffix=".tar") as copy:
        fs.get_file(name, copy.name)
        return map_file(copy.name)  # it stays readable without its name


def _sample(
    data: mmap.mmap, row: dict[str, Any], key: str, members: list[tuple[str, Member]], most: int
) -> Member | tuple[str, str]:
    """The picture of a sample, whose texts go into its row, or why there is none."""
    pictures = [member for name, member in members if name.rpartition(".")[2] in PICTURES]
    try:
        # Texts first: what they hold goes before a caption inside the JSON.
        for name, member in sorted(members, key=lambda each: not each[0].endswith("txt")):
            if name in ("txt", "json"):
                size = min(member.size, MAX_SIDECAR + 1)
                _tell(row, f".{name}", data[member.offset : member.offset + size])
    except ValueError as error:
        return "bad_row", f"{key}: {error}"
    if len(pictures) != 1:
        found = ", ".join(name for name, _ in members)
        return "bad_row", f"{key} has {len(pictures)} pictures in {found}"
    if pictures[0].size > most:
        return "too_large", f"{pictures[0].size} bytes, limit {most}"
    return pictures[0]


def _pictures(data: mmap.mmap, found: list[Member | tuple[str, str]]) -> Iterator[Download]:
    for index, each in enumerate(found):
        if isinstance(each, Member):
            yield Download(index, "ok", body=data[each.offset : each.offset + each.size])
        else:
            yield Download(index, *each)
