"""What a list of pictures is made of: one file, those of a pattern, or those of a folder.

Paths are local or any fsspec URL. Files are read in the order of their names, and the format is
told from the names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import fsspec

Format = Literal["auto", "tsv", "csv", "jsonl", "parquet", "folder", "webdataset"]
PICTURES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic"})
"""Extensions of pictures in folders and tars, also those whose format will be refused by name."""

COMPRESSED = {"gz": "gzip", "bz2": "bz2", "zst": "zstd"}
_FORMATS: dict[str, Format] = {
    "tsv": "tsv", "txt": "tsv", "csv": "csv", "jsonl": "jsonl", "ndjson": "jsonl",
    "parquet": "parquet", "pq": "parquet", "tar": "webdataset",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Source:
    """A list of pictures, and which of its columns mean what."""

    path: str
    format: Format = "auto"
    """auto: from the file's extension, or from what a folder holds."""
    url: str = ""
    """Column of the URLs; "": "url", or the first column of a TSV."""
    caption: str = ""
    """Column of the captions; "": "caption", or the second column of a TSV; "-": none."""
    extra: tuple[str, ...] = ()
    """Further columns that are kept."""

    @property
    def plain(self) -> bool:
        """Whether this is the list that needs no words: a TSV of url<TAB>caption."""
        return self.format == "tsv" and not (self.url or self.caption or self.extra)


def detect(source: Source) -> Source:
    """The source with its format filled in.

    Raises:
        ValueError: the path tells no format, or the columns do not suit it.
        FileNotFoundError: there is nothing at the path.
    """
    if source.format == "auto":
        source = replace(source, format=_format_of(source.path))
    if source.format in ("folder", "webdataset") and (source.url or source.caption or source.extra):
        raise ValueError(f"a source of format {source.format!r} has no columns to choose")
    return source


def filesystem(path: str) -> tuple[Any, str]:
    """The filesystem behind a path or URL, asked anew for each listing, and the path within."""
    fs, root = fsspec.core.url_to_fs(path, use_listings_cache=False)
    return fs, str(root)


def _format_of(path: str) -> Format:
    fs, root = filesystem(path)
    if not _is_folder(fs, root):
        return _by_extension(path)
    for file in _walk(fs, root):
        extension = file["name"].rpartition(".")[2].lower()
        if extension in PICTURES:
            return "folder"
        if extension in _FORMATS and _FORMATS[extension] != "tsv":
            return _FORMATS[extension]
    raise ValueError(f"{path} holds neither pictures nor lists nor tars")


def _by_extension(path: str) -> Format:
    parts = path.lower().rstrip("*").split(".")
    packed = parts.pop() if parts[-1] in COMPRESSED else ""
    if packed and _FORMATS.get(parts[-1]) == "webdataset":
        raise ValueError(f"{path} is read as it lies, not out of .{packed}; decompress it first")
    if "." not in path.rpartition("/")[2]:
        return "tsv"  # a bare name has always been one
    if parts[-1] not in _FORMATS:
        raise ValueError(
            f"the name of {path} tells no format; choose tsv, csv, jsonl, parquet, folder or "
            "webdataset"
        )
    return _FORMATS[parts[-1]]


def _walk(fs: Any, folder: str) -> Iterator[dict[str, Any]]:
    """Files below a folder in the order of their names, one listing in memory at a time."""
    for entry in sorted(fs.ls(folder, detail=True), key=lambda e: str(e["name"])):
        name = entry["name"].rstrip("/")
        if name.rpartition("/")[2].startswith(".") or is_loop(fs, entry) or name == folder:
            continue
        if entry["type"] == "directory":
            yield from _walk(fs, name)
        else:
            yield entry


def is_loop(fs: Any, entry: dict[str, Any]) -> bool:
    """Whether an entry of a listing is a link to a folder, which may be one that leads here."""
    return bool(entry.get("islink")) and bool(fs.isdir(entry["name"]))


def files_of(source: Source) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The files that make up a source: one, those of a pattern, or those of a folder."""
    fs, root = filesystem(source.path)
    if "*" in root:
        found = [file for _, file in sorted(fs.glob(root, detail=True).items())]
    elif _is_folder(fs, root):
        found = [f for f in _walk(fs, root) if _is_of(f["name"], source.format)]
    else:
        found = [{"name": root}]
    if not found:
        raise FileNotFoundError(f"nothing of format {source.format} at {source.path}")
    for file in found:
        yield fs, file


def _is_folder(fs: Any, path: str) -> bool:
    """Whether a path is a folder; asking that of a web server would fetch the whole list."""
    return "http" not in fs.protocol and bool(fs.isdir(path))


def _is_of(name: str, wanted: Format) -> bool:
    try:
        return _by_extension(name) == wanted
    except ValueError:
        return False
