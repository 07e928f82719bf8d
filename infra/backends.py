"""The two places a `Store` keeps bytes: a folder, and an S3 bucket.

Both take paths that the store has checked, and answer absence with None or FileNotFoundError.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from infra import cache
from infra.s3_errors import http_status, in_words, is_transient

_LOG = logging.getLogger("fourm.store")
_T = TypeVar("_T")

PRIVATE = ".fourm"
"""Folder of temporary files, locks and the probe object; never listed."""
_PAUSES = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)


class Entry(NamedTuple):
    """One object of a listing."""

    size: int
    modified: float
    """POSIX seconds."""


def check_folder(folder: Path) -> None:
    """Raises ValueError where files cannot be written below a folder, which need not exist yet."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"nothing can be written to {folder}: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"nothing can be written to {folder}: {there} does not allow it")


class LocalBackend:
    """A folder. Locks are `flock`s, so compare-and-swap holds between processes of one host."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def check_writable(self) -> None:
        check_folder(self.root)

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        with _temporary(self.root / PRIVATE, data) as temporary:
            target = self._target(path)
            os.replace(temporary, target)
            _flush_folder(target.parent)

    def create(self, path: str, data: bytes) -> bool:
        target = self._target(path)
        if target.exists():
            return False
        with _temporary(self.root / PRIVATE, data) as temporary:
            try:
                os.link(temporary, target)  # fails when the name is taken: atomic put-if-absent
            except FileExistsError:
                return False
            _flush_folder(target.parent)
        return True

    def version(self, path: str) -> str | None:
        try:
            return hashlib.sha256(self.read(path)).hexdigest()
        except FileNotFoundError:
            return None

    def replace(self, path: str, data: bytes, expected: str | None) -> bool:
        lock = self.root / PRIVATE / f"{hashlib.sha256(path.encode()).hexdigest()[:16]}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("wb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # released by the kernel however we end
            if self.version(path) != expected:
                return False
            self.write(path, data)
        return True

    def entries(self, prefix: str) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        folders = [prefix.rpartition("/")[0]]
        while folders:
            folder = folders.pop()
            try:
                entries = list(os.scandir(self.root / folder))
            except (FileNotFoundError, NotADirectoryError):
                continue
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir():
                    if path.startswith(prefix) or prefix.startswith(f"{path}/"):
                        folders.append(path)
                elif path.startswith(prefix):
                    try:
                        about = entry.stat()
                    except FileNotFoundError:  # removed since the folder was read
                        continue
                    found[path] = Entry(about.st_size, about.st_mtime)
        return found

    def unfinished(self) -> dict[str, float]:
        """Temporary files; a write that is under way has one for less than a second."""
        found = self.entries(f"{PRIVATE}/")
        names = {path: entry for path, entry in found.items() if not path.endswith(".lock")}
        return {path: entry.modified for path, entry in names.items()}

    def discard(self, token: str) -> None:
        self.delete(token)

    def entry(self, path: str) -> Entry | None:
        target = self.root / path
        if not target.is_file():
            return None
        about = target.stat()
        return Entry(about.st_size, about.st_mtime)

    def delete(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)

    def local(self, path: str, sha256: str | None) -> Path:
        target = self.root / path
        if not target.is_file():
            raise FileNotFoundError(path)
        return target

    def _target(self, path: str) -> Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


class S3Backend:
    """A bucket and prefix through s3fs, with conditional PUTs."""

    def __init__(self, root: str, options: dict[str, Any]) -> None:
        self.root = root
        self._options = options

    @cached_property
    def fs(self) -> Any:
        import s3fs

        options: dict[str, Any] = {"config_kwargs": {"max_pool_connections": 32}}
        # Neither listings nor instances may be shared: other processes write, and tests
        # change endpoints.
        return s3fs.S3FileSystem(
            **(options | self._options), use_listings_cache=False, skip_instance_cache=True
        )

    @cached_property
    def conditional(self) -> bool:
        """Whether the service honours If-None-Match; asked with one tiny object."""
        return self._honours("If-None-Match", lambda probe: self._create(probe, b"probe")
                             and self._create(probe, b"probe"))  # fmt: skip

    @cached_property
    def swaps(self) -> bool:
        """Whether it honours If-Match, too, which some services that know the other one do not."""
        never = '"00000000000000000000000000000000"'
        return self.conditional and self._honours(
            "If-Match", lambda probe: self._put_if(probe, b"probe", IfMatch=never))

    def _honours(self, condition: str, broken: Callable[[str], bool]) -> bool:
        """Whether a write that the condition forbids is refused.

        Args:
            condition: Its header.
            broken: Tries to write so at a path; tells whether that went through.
        """
        try:
            honoured = not broken(f"{PRIVATE}/probe")
        except OSError as error:
            if http_status(error) != 501:
                raise
            honoured = False
        if not honoured:
            _LOG.warning(
                "s3://%s ignores conditional writes: two runs at once on this dataset could both "
                "commit a shard or publish a version. Run one at a time, or use a service that "
                "honours %s.", self.root, condition,
            )
        return honoured

    def check_writable(self) -> None:
        try:
            _ = self.swaps
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no bucket of s3://{self.root}: {error}") from error

    def read(self, path: str) -> bytes:
        return self._retry(lambda: self.fs.cat_file(self._key(path)))

    def write(self, path: str, data: bytes) -> None:
        self._retry(lambda: self.fs.pipe_file(self._key(path), data))

    def create(self, path: str, data: bytes) -> bool:
        if self.conditional:
            return self._create(path, data)
        if self.entry(path) is not None:
            return False
        self.write(path, data)
        return True

    def _create(self, path: str, data: bytes) -> bool:
        return self._put_if(path, data, mode="create")

    def version(self, path: str) -> str | None:
        info = self._info(path)
        return None if info is None else info["ETag"]

    def replace(self, path: str, data: bytes, expected: str | None) -> bool:
        if expected is None:
            return self.create(path, data)
        if not self.swaps:
            if self.version(path) != expected:
                return False
            self.write(path, data)
            return True
        return self._put_if(path, data, IfMatch=expected)

    def entries(self, prefix: str) -> dict[str, Entry]:
        folder, _, stem = prefix.rpartition("/")
        base = self._key(folder) if folder else self.root
        whole = f"{self.root}/{prefix}"

        def found() -> dict[str, Entry]:
            listing = self.fs.find(base, prefix=stem, detail=True)
            files = {name: _entry(info) for name, info in listing.items()
                     if info["type"] == "file"}  # fmt: skip
            return {name[len(self.root) + 1 :]: entry for name, entry in files.items()
                    if name.startswith(whole)}  # fmt: skip

        return self._retry(found)

    def unfinished(self) -> dict[str, float]:
        """Multipart uploads that were neither completed nor aborted: they cost, and nobody sees
        them in a listing."""
        bucket, _, prefix = self.root.partition("/")
        found: dict[str, float] = {}
        marker: dict[str, str] = {}
        while True:
            where = {"Bucket": bucket, "Prefix": prefix, **marker}
            page = self._retry(partial(self.fs.call_s3, "list_multipart_uploads", **where))
            for upload in page.get("Uploads", []):
                if f"{bucket}/{upload['Key']}".startswith(f"{self.root}/"):
                    token = f"{upload['UploadId']} {upload['Key']}"
                    found[token] = upload["Initiated"].timestamp()
            if not page.get("IsTruncated"):
                return found
            marker = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page["NextUploadIdMarker"],
            }

    def discard(self, token: str) -> None:
        upload, _, key = token.partition(" ")
        bucket = self.root.partition("/")[0]
        try:
            self._retry(
                lambda: self.fs.call_s3(
                    "abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload
                )
            )
        except FileNotFoundError:
            return

    def entry(self, path: str) -> Entry | None:
        info = self._info(path)
        return None if info is None else _entry(info)

    def delete(self, path: str) -> None:
        try:
            self._retry(lambda: self.fs.rm_file(self._key(path)))
        except FileNotFoundError:
            return

    def local(self, path: str, sha256: str | None) -> Path:
        version = sha256 or self.version(path)
        if version is None:
            raise FileNotFoundError(path)
        folder = Path(os.environ.get("FOURM_CACHE") or "~/.cache/fourm").expanduser()
        origin = hashlib.sha256(f"{self.root}/{path}@{version}".encode()).hexdigest()
        target = cache.path_of(folder, sha256 or origin, Path(path).suffix)
        if cache.found(target):
            return target
        data = self.read(path)
        if sha256 and hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError(f"s3://{self._key(path)} does not have sha256 {sha256}")
        target.parent.mkdir(parents=True, exist_ok=True)
        cache.make_room(folder, len(data))
        with _temporary(folder / cache.UNFINISHED, data) as temporary:
            os.replace(temporary, target)
        return target

    def _key(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _info(self, path: str) -> dict[str, Any] | None:
        try:
            info = self._retry(partial(self._asked, path))
        except FileNotFoundError:
            return None
        return info if info["type"] == "file" else None

    def _asked(self, path: str) -> dict[str, Any]:
        info: dict[str, Any] = self.fs.info(self._key(path))
        if info["type"] == "file" and _entry(info) and not info["ETag"]:
            raise ValueError("an object without an ETag")
        return info

    def _put_if(self, path: str, data: bytes, **condition: str) -> bool:
        try:
            self._retry(lambda: self.fs.pipe_file(self._key(path), data, **condition))
        except FileExistsError:
            return False
        except OSError as error:
            missing = isinstance(error, FileNotFoundError) and "IfMatch" in condition
            if http_status(error) == 412 or missing:
                return False
            raise
        return True

    def _retry(self, call: Callable[[], _T]) -> _T:
        for pause in _PAUSES:
            try:
                with in_words(self.root):
                    return call()
            except OSError as error:
                if not is_transient(error):
                    raise
                # Nobody may be there at all, as where an endpoint is misspelt.
                level = logging.WARNING if isinstance(error, ConnectionError) else logging.INFO
                _LOG.log(level, "s3://%s: %s; trying again", self.root, error)
                time.sleep(pause * random.uniform(0.5, 1.5))
        with in_words(self.root):
            return call()


def _entry(info: dict[str, Any]) -> Entry:
    return Entry(info["size"], info["LastModified"].timestamp())


@contextmanager
def _temporary(folder: Path, data: bytes) -> Iterator[Path]:
    """A flushed file with the data, gone afterwards unless it was renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / uuid.uuid4().hex
    try:
        with path.open("xb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
