"""One dataset root, on a disk or in S3, with the four promises the ledger is built on.

* A reader sees an object whole or not at all, whatever is killed whenever: a local object is
  written to a temporary file, flushed to disk and then linked or renamed; an S3 object is one PUT
  or one completed multipart upload. Streaming into the final name (`fs.open(path, "wb")`) is
  never done, since an exception inside the block would publish what had been written so far.
* `create` is put-if-absent: of any number of writers exactly one hears True.
* `replace` is compare-and-swap on the version that the caller has read.
* A listing is one walk or one LIST, never one request for each object.

>>> store = Store("file:///data/cc12m")            # or "/data/cc12m", or "s3://bucket/cc12m"
>>> store.create_json("commits/a.json", {"n": 1})  # True the first time, False ever after
"""

from __future__ import annotations

import errno
import io
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from infra.backends import PRIVATE, Entry, LocalBackend, S3Backend


class StoreConflict(RuntimeError):
    """The object has changed since the caller read the version it expected."""


class Store:
    """Objects under one URL.

    Cheap to construct, safe to share between threads, and picklable: connections are opened at
    first use and never travel. S3 credentials and endpoint come from the environment (`AWS_*`,
    `AWS_ENDPOINT_URL`) or from `storage_options`.

    Args:
        url: `file:///x`, `/x`, a relative path, or `s3://bucket/prefix`.
        storage_options: keyword arguments for `s3fs.S3FileSystem`.

    Raises:
        ValueError: the URL has another scheme or half of one, names no bucket, or one version of
            an object.
    """

    def __init__(self, url: str, storage_options: dict[str, Any] | None = None) -> None:
        self._options = dict(storage_options or {})
        scheme, separator, rest = str(url).partition("://")
        if separator and scheme == "s3":
            root = rest.strip("/")
            if not root:
                raise ValueError(f"{url!r} names no bucket; write s3://bucket/prefix")
            if "?versionId=" in root:  # s3fs would take all objects for versions of one
                raise ValueError(f"{url!r} names a version of an object, and no prefix")
            self.url = f"s3://{root}"
            self._root: str | Path = root
        elif not separator and str(url).startswith(("s3:", "file:")):
            raise ValueError(f"{url!r} lacks a slash; write s3://bucket/prefix or file:///folder")
        elif separator and scheme != "file":
            raise ValueError(f"{url!r} is neither a file:// nor an s3:// URL nor a path")
        else:
            path = unquote(urlsplit(url).path) if separator else str(url)
            self._root = Path(path).expanduser().resolve()
            self.url = f"file://{self._root}"

    def __reduce__(self) -> tuple[type[Store], tuple[str, dict[str, Any]]]:
        # Constructed from the plain path or URL: a quoted path would be unquoted once more.
        url = str(self._root) if isinstance(self._root, Path) else self.url
        return Store, (url, self._options)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    @cached_property
    def _backend(self) -> LocalBackend | S3Backend:
        if isinstance(self._root, Path):
            return LocalBackend(self._root)
        return S3Backend(self._root, self._options)

    def now(self) -> float:
        """POSIX seconds by the clock that tells when objects were written: the service's, a file
        server's. That of this host may be hours away from it."""
        path = f"{PRIVATE}/{uuid.uuid4().hex}"
        self._backend.write(path, b"now")
        try:
            entry = self._backend.entry(path)
        finally:
            self._backend.delete(path)
        if entry is None:
            raise OSError(f"{self.full(path)} was removed at once by somebody else")
        return entry.modified

    def check_writable(self) -> None:
        """Finds out whether objects can be put here, before hours of work end without a place.

        Raises:
            ValueError: a file is in the way of the folder, or it cannot be written.
            OSError: the bucket does not exist, refuses, or cannot be reached.
        """
        self._backend.check_writable()

    def full(self, path: str) -> str:
        """URL of an object, for messages and links."""
        return f"{self.url}/{path}"

    def read(self, path: str) -> bytes:
        """Content of an object. Raises FileNotFoundError naming the URL."""
        with self._named(path):
            return self._backend.read(_checked(path))

    def write(self, path: str, data: bytes) -> None:
        """Puts an object, replacing any that was there; readers see the old or the new one."""
        self._backend.write(_checked(path), data)

    def create(self, path: str, data: bytes) -> bool:
        """Puts an object unless one is there.

        Returns:
            True for the one writer that created it. An S3 writer whose answer was lost on the way
            back may hear False about its own object, so compare the content where it matters.
        """
        return self._backend.create(_checked(path), data)

    def version(self, path: str) -> str | None:
        """An opaque name of an object's present content; None when there is no object."""
        return self._backend.version(_checked(path))

    def replace(self, path: str, data: bytes, expected: str | None) -> None:
        """Puts an object if its version is still `expected` (None: if there is none).

        Raises:
            StoreConflict: somebody else was first; read again and decide anew.
        """
        if not self._backend.replace(_checked(path), data, expected):
            raise StoreConflict(f"{self.full(path)} has changed since it was read")

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Relative path -> bytes of every object whose path starts with `prefix`, sorted."""
        return {path: entry.size for path, entry in self.entries(prefix).items()}

    def entries(self, prefix: str = "") -> dict[str, Entry]:
        """Like `sizes`, with size and time of the last writing."""
        found = self._backend.entries(_checked(prefix, empty=True))
        return {p: found[p] for p in sorted(found) if not p.startswith(f"{PRIVATE}/")}

    def unfinished(self) -> dict[str, float]:
        """Writes that were begun and never ended, with the time they began in POSIX seconds.

        Names are for `discard` alone: temporary files of a folder, multipart uploads of a bucket.
        """
        return self._backend.unfinished()

    def discard(self, name: str) -> None:
        """Forgets an unfinished write and frees what it occupies."""
        self._backend.discard(name)

    def list(self, prefix: str = "") -> list[str]:
        """Sorted relative paths that start with `prefix`, from one listing."""
        return list(self.sizes(prefix))

    def exists(self, path: str) -> bool:
        """Whether the object is there."""
        return self.entry(path) is not None

    def entry(self, path: str) -> Entry | None:
        """Size and time of the last writing of one object, in whole seconds where the service
        tells no more; None when there is no object."""
        return self._backend.entry(_checked(path))

    def size(self, path: str) -> int:
        """Bytes of an object. Raises FileNotFoundError naming the URL."""
        found = self.entry(path)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", self.full(path))
        return found.size

    def delete(self, path: str) -> None:
        """Removes an object; nothing happens when there is none."""
        self._backend.delete(_checked(path))

    def local(self, path: str, sha256: str | None = None) -> Path:
        """A file with the object's content, for memory-mapping.

        A file store answers with the file itself. An S3 store downloads once into `$FOURM_CACHE`
        (default `~/.cache/fourm`) under the content's hash or version, so that a changed object
        is never served from the cache. Where the disk gets full, copies that were not used for
        longest are removed (`infra.cache`); delete the folder at will.

        Args:
            sha256: hex digest of the content: saves a request on a cache hit, and a download that
                differs is refused.

        Raises:
            FileNotFoundError: no such object; names the URL.
            ValueError: the downloaded bytes do not have the digest.
        """
        with self._named(path):
            return self._backend.local(_checked(path), sha256)

    def read_json(self, path: str) -> Any:
        """An object parsed as JSON. Raises ValueError naming the URL when it is not."""
        try:
            return json.loads(self.read(path))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.full(path)} is not valid JSON: {error}") from error

    def write_json(self, path: str, value: Any) -> None:
        """`write` of canonical JSON."""
        self.write(path, json_bytes(value))

    def create_json(self, path: str, value: Any) -> bool:
        """`create` of canonical JSON."""
        return self.create(path, json_bytes(value))

    @contextmanager
    def _named(self, path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "no such object", self.full(path)) from error


def json_bytes(value: Any) -> bytes:
    """Canonical JSON: sorted keys, so that equal values are equal bytes in every process."""
    data = io.BytesIO()
    # Piece by piece: all pieces of a large manifest at once are several times its size.
    text = io.TextIOWrapper(data, "utf-8", newline="\n")
    json.dump(value, text, sort_keys=True, indent=1, ensure_ascii=False)
    text.write("\n")
    text.flush()
    return data.getvalue()


def _checked(path: str, *, empty: bool = False) -> str:
    parts = path.split("/")
    if path.startswith("/") or ".." in parts or "\0" in path or not (path or empty):
        raise ValueError(f"{path!r} is not a relative path inside the store")
    return path
