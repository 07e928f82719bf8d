"""Copies of objects on the disk: where it gets full, those go that were not used for longest.

    <cache>/ab/ab12...34.tar     by the hash of the content, or of the object's name and version

Whoever has opened or mapped a copy keeps it, although it is removed meanwhile.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

UNFINISHED = ".fourm"
"""Folder of copies that are being made."""
SPARE = 0.1
"""Share of the disk that copies leave free."""
YOUNG = 3600.0
"""Seconds after its last use in which a copy stays: somebody may be about to open it."""
_COPY = re.compile(r"[0-9a-f]{64}(\..*)?")


def path_of(cache: Path, digest: str, suffix: str) -> Path:
    """Where the copy of an object lies, or will."""
    return cache / digest[:2] / f"{digest}{suffix}"


def found(copy: Path) -> bool:
    """Whether there is a copy; it counts as used."""
    with suppress(OSError):  # a cache of somebody else's may be read only
        os.utime(copy)
    return copy.is_file()


def make_room(cache: Path, size: int) -> None:
    """Remove copies until `size` bytes more leave `SPARE` of the disk, as far as they are old.

    The next objects should not have to ask for room again, so that twice as much is left.
    """
    disk = shutil.disk_usage(cache)
    if disk.free - size >= SPARE * disk.total:
        return
    missing = 2 * SPARE * disk.total + size - disk.free
    for _, bytes_freed, copy in sorted(_old(cache)):
        if missing <= 0:
            return
        with suppress(OSError):  # gone already, or of somebody else
            copy.unlink()
            missing -= bytes_freed


def _old(cache: Path) -> Iterator[tuple[float, int, Path]]:
    """Last use, size and path of the copies that may go, and of what a kill left half made."""
    before = time.time() - YOUNG
    copies = (file for file in cache.glob("[0-9a-f][0-9a-f]/*") if _COPY.fullmatch(file.name))
    for file in chain(cache.glob(f"{UNFINISHED}/*"), copies):
        with suppress(FileNotFoundError):  # another process makes room too
            about = file.stat()
            if about.st_mtime < before:
                yield about.st_mtime, about.st_size, file
