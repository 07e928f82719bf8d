"""WebDataset tars: written byte-identically, read strictly.

The usual tar readers take a file cut at a member boundary for a shorter archive: 100 samples
become 40 without a word, and a zip over modalities then drops the tail of all of them. Here an
archive ends with exactly two zero blocks, and a reader that does not find them, or finds a
damaged header, a damaged padding or anything behind the end, raises `TornShard` with the name of
the source. A flipped bit inside a payload is found through the sha256 that every commit records.

>>> data = write_tar([("00000100000.txt", b"a red cube"), ("00000100001.txt", b"a sphere")])
>>> dict(read_tar(data))["00000100001.txt"]
b'a sphere'
"""

from __future__ import annotations

import hashlib
import json
import mmap
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_SHARDS = 1_000_000
"""Shards of a dataset: keys have six digits for their number."""
MISSING_EXT = "missing"
"""Extension of a hole: member `{key}.missing` is JSON `{"reason": ...}` in the label's place."""

_BLOCK = 512
_RECORD = 10_240  # other writers pad the archive with zeros to whole records of 20 blocks
_ZEROS = bytes(_BLOCK)
_MAX_EXTENDED = 1 << 20  # bytes of an extended header, which holds a name and some times


class TornShard(ValueError):
    """A shard that is truncated, altered, or not a tar at all."""


def sample_key(shard: int, row: int) -> str:
    """Key of a sample, e.g. (12, 345) -> "00001200345": sorts by shard, then by row.

    Raises:
        ValueError: shard outside 0..999999 or row outside 0..99999.
    """
    if not (0 <= shard < MAX_SHARDS and 0 <= row <= 99_999):
        raise ValueError(f"shard {shard}, row {row}: outside 0..999999 and 0..99999")
    return f"{shard:06d}{row:05d}"


def shard_name(shard: int) -> str:
    """Stem of a shard's files, e.g. "shard-000123"."""
    return f"shard-{shard:06d}"


def key_digest(keys: Iterable[str]) -> str:
    """sha256 (hex) of the keys in their order; equal digests mean aligned shards."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def hole(key: str, reason: str) -> tuple[str, bytes]:
    """The member that stands for a sample without a label."""
    return f"{key}.{MISSING_EXT}", json.dumps({"reason": reason}).encode()


def split_name(name: str) -> tuple[str, str]:
    """Member name -> (key, extension): the key ends at the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return f"{folder}{slash}{key}", extension


def write_tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    """A USTAR archive whose bytes depend on the members alone (mtime, uid and gid are 0).

    Raises:
        ValueError: a name occurs twice or does not fit a USTAR header (100 ASCII bytes).
    """
    parts: list[bytes] = []
    seen: set[str] = set()
    for name, payload in members:
        if not name or name in seen:
            raise ValueError(f"member name {name!r} is empty or occurs twice")
        seen.add(name)
        header = tarfile.TarInfo(name)
        header.size, header.mode = len(payload), 0o644
        try:
            parts.append(header.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
        except UnicodeEncodeError as error:
            raise ValueError(f"member name {name!r} is not ASCII") from error
        parts += (payload, bytes(-len(payload) % _BLOCK))
    parts += (_ZEROS, _ZEROS)
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Member:
    """Where a member's payload lies in an archive, in bytes from its start."""

    name: str
    offset: int
    size: int


def scan_tar(data: bytes | memoryview | mmap.mmap, source: str = "tar") -> list[Member]:
    """Checks the structure of a whole archive without reading the payloads.

    Accepts what other writers add: pax and GNU long-name headers, folders, record padding.

    Raises:
        TornShard: truncation at any place, a damaged header or padding, trailing bytes.
    """
    members: list[Member] = []
    view, total, at, long_name = memoryview(data), len(data), 0, ""
    while True:
        header = bytes(view[at : at + _BLOCK])
        if len(header) < _BLOCK:
            raise TornShard(f"{source}: truncated at byte {total}, no end-of-archive marker")
        if header == _ZEROS:
            _check_end(view, at, source)
            return members
        name, size, kind = _parse_header(header, at, source)
        start, end = at + _BLOCK, at + _BLOCK + size
        at = end + -size % _BLOCK
        if at > total:
            raise TornShard(f"{source}: truncated inside {name!r}, {at - total} bytes missing")
        if any(view[end:at]):
            raise TornShard(f"{source}: damaged padding behind {name!r}")
        if kind in b"0\0":
            members.append(Member(long_name or name, start, size))
            long_name = ""
        elif kind in b"xL":
            if size > _MAX_EXTENDED:
                raise TornShard(f"{source}: an extended header of {size} bytes")
            long_name = _long_name(kind, bytes(view[start:end]), source) or long_name
        elif kind == ord("5"):
            long_name = ""  # of the folder, not of the file behind it
        elif kind != ord("g"):
            raise TornShard(f"{source}: {name!r} is a link or device, not a file")


def _check_end(view: memoryview, at: int, source: str) -> None:
    rest = view[at:]
    if len(rest) < 2 * _BLOCK:
        raise TornShard(f"{source}: truncated inside the end-of-archive marker")
    padded = len(view) % _RECORD == 0 and len(rest) <= _RECORD + _BLOCK
    if (len(rest) != 2 * _BLOCK and not padded) or any(rest):
        raise TornShard(f"{source}: bytes behind the end-of-archive marker")


def _parse_header(header: bytes, at: int, source: str) -> tuple[str, int, int]:
    try:
        stored = int(header[148:156].strip(b" \0"), 8)
        size = int(header[124:136].strip(b" \0") or b"0", 8)
        name = header[:100].split(b"\0", 1)[0].decode()
        prefix = header[345:500].split(b"\0", 1)[0].decode()
    except ValueError as error:
        raise TornShard(f"{source}: damaged header at byte {at}") from error
    # The checksum counts its own field as eight spaces.
    if stored != sum(header) - sum(header[148:156]) + 8 * 32:
        raise TornShard(f"{source}: header checksum is wrong at byte {at}")
    if header[257:262] != b"ustar" or size < 0:
        raise TornShard(f"{source}: not a USTAR header at byte {at}")
    ustar = header[257:263] == b"ustar\0"  # GNU archives keep times where the prefix would be
    return (f"{prefix}/{name}" if prefix and ustar else name), size, header[156]


def _long_name(kind: int, payload: bytes, source: str) -> str:
    """The name a GNU 'L' or pax 'x' header gives to the next member; "" when it gives none."""
    at, name = 0, ""
    try:
        if kind == ord("L"):
            return payload.rstrip(b"\0").decode()
        while at < len(payload):
            blank = payload.index(b" ", at)
            end = at + int(payload[at:blank])
            if end <= blank or payload[end - 1 : end] != b"\n":
                raise TornShard(f"{source}: damaged extended header")
            key, _, value = payload[blank + 1 : end - 1].partition(b"=")
            if key == b"size":
                raise TornShard(f"{source}: members of 8 GiB and more are not supported")
            if key.startswith(b"GNU.sparse"):
                raise TornShard(f"{source}: sparse members are not supported")
            if key == b"path":
                name = value.decode()
            at = end
    except ValueError as error:
        if isinstance(error, TornShard):
            raise
        raise TornShard(f"{source}: damaged extended header") from error
    return name


def read_tar(
    path_or_bytes: str | Path | bytes, *, sha256: str | None = None, source: str = ""
) -> Iterator[tuple[str, bytes]]:
    """Name and payload of every member in order; the whole archive is checked before the first.

    Args:
        sha256: expected hex digest of the archive; without it a bit flipped inside a payload
            goes unseen.
        source: name for messages; the path when empty.

    Raises:
        TornShard: see `scan_tar`; also when the digest differs.
    """
    data = path_or_bytes if isinstance(path_or_bytes, bytes) else Path(path_or_bytes).read_bytes()
    source = source or ("tar" if isinstance(path_or_bytes, bytes) else str(path_or_bytes))
    check_sha256(data, sha256, source)
    for member in scan_tar(data, source):
        yield member.name, data[member.offset : member.offset + member.size]


def check_sha256(data: bytes | mmap.mmap, sha256: str | None, source: str) -> None:
    """Raises TornShard unless the data has the digest; None accepts everything."""
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise TornShard(f"{source}: sha256 is {found}, recorded is {sha256}")


def map_file(path: str | Path) -> mmap.mmap:
    """A read-only memory map. Raises TornShard for an empty file, which cannot be mapped."""
    with Path(path).open("rb") as handle:
        try:
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise TornShard(f"{path}: empty file") from error


def member_keys(members: Iterable[Member], source: str) -> list[str]:
    """Keys in order, for tars with one member for each sample.

    Raises:
        TornShard: a key occurs twice.
    """
    keys = [split_name(member.name)[0] for member in members]
    if len(set(keys)) != len(keys):
        raise TornShard(f"{source}: a key occurs twice; expected one member for each sample")
    return keys


class TarIndex:
    """Random access by key to a tar with one member for each sample, through a memory map.

    Picklable: the map is opened again where it arrives.

    Raises:
        TornShard: see `scan_tar`; also when a key occurs twice or the sha256 differs.
    """

    def __init__(self, path: str | Path, *, sha256: str | None = None) -> None:
        self._path = Path(path)
        self._map = map_file(path)
        check_sha256(self._map, sha256, str(path))
        members = scan_tar(self._map, str(path))
        self.keys = member_keys(members, str(path))
        self._members = dict(zip(self.keys, members, strict=True))

    def __reduce__(self) -> tuple[type[TarIndex], tuple[Path]]:
        return TarIndex, (self._path,)

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: str) -> bool:
        return key in self._members

    def ext(self, key: str) -> str:
        """Extension of a key's member, `MISSING_EXT` for a hole."""
        return split_name(self._members[key].name)[1]

    def read(self, key: str) -> bytes:
        """A key's payload.

        Raises:
            KeyError: no such key, or the sample is a hole (see `ext`).
        """
        member = self._members[key]
        payload = self._map[member.offset : member.offset + member.size]
        if member.name.endswith(f".{MISSING_EXT}"):
            raise KeyError(f"{self._path}: {key} is a hole: {payload.decode(errors='replace')}")
        return payload
