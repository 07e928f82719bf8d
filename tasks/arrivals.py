"""Where the bytes of planned rows come from: the web, a folder of files, or tars of others.

Each way in yields one :class:`~infra.download.Download` for each wanted row, whatever happens;
files and tars fill in the caption and the further columns that lie beside a picture.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import fsspec

from infra.download import Download
from infra.shards import scan_tar, split_name
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
        row["caption"] = data.decode("utf-8", "replace")
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


def from_tar(path: str, max_bytes: int) -> tuple[list[dict[str, Any]], list[Download]]:
    """Rows of a WebDataset tar in its order, and their pictures.

    A sample has one picture and, as far as they are there, a `.txt` caption and a `.json` with
    further columns; its key in the tar becomes the column `__key__`.

    Raises:
        TornShard: the tar is truncated or damaged, or another file.
        ValueError: it holds more samples than a shard may.
    """
    fs, name = fsspec.core.url_to_fs(path)
    data = fs.cat_file(name)
    samples: dict[str, list[tuple[str, bytes]]] = {}
    for member in scan_tar(data, path):
        key, extension = split_name(member.name)
        payload = data[member.offset : member.offset + member.size]
        samples.setdefault(key, []).append((extension.lower(), payload))
    if len(samples) > MAX_ROWS:
        raise ValueError(f"{path} holds {len(samples)} samples, a shard at most {MAX_ROWS}")
    rows: list[dict[str, Any]] = []
    arrived: list[Download] = []
    for index, (key, members) in enumerate(samples.items()):
        row, download = _sample(path, index, key, members, max_bytes)
        rows.append(row)
        arrived.append(download)
    return rows, arrived


def _sample(
    path: str, index: int, key: str, members: list[tuple[str, bytes]], max_bytes: int
) -> tuple[dict[str, Any], Download]:
    row: dict[str, Any] = {
        "url": f"{path}#{key}",
        "caption": "",
        "extra": json.dumps({"__key__": key}),
    }
    pictures = [data for name, data in members if name.rpartition(".")[2] in PICTURES]
    try:
        # Texts first: what they hold goes before a caption inside the JSON.
        for name, data in sorted(members, key=lambda member: not member[0].endswith("txt")):
            if name in ("txt", "json"):
                _tell(row, f".{name}", data)
    except ValueError as error:
        return row, Download(index, "bad_row", f"{key}: {error}")
    if len(pictures) != 1:
        found = ", ".join(name for name, _ in members)
        return row, Download(index, "bad_row", f"{key} has {len(pictures)} pictures in {found}")
    if len(pictures[0]) > max_bytes:
        return row, Download(index, "too_large", f"{len(pictures[0])} bytes, limit {max_bytes}")
    return row, Download(index, "ok", body=pictures[0])
