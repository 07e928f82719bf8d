"""Room for copies of a bucket's objects on this machine's disk, whatever a run goes through.

A dataset is larger than the disks of those who work on it. Copies stay for as long as there is
room; then what was longest unused goes. A copy that is still mapped somewhere stays readable there.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

_LOG = logging.getLogger("fourm.store")

FREE_SHARE = 0.1
"""Of the disk: so much is left for others. Kubernetes removes pods from a fuller one."""
RECENT_SECONDS = 3600.0
"""A copy that was asked for since is not removed: who asked may not have opened it yet."""


def used(copy: Path) -> bool:
    """Whether there is a copy; if so, it counts as used now."""
    try:
        os.utime(copy)
    except FileNotFoundError:
        return False
    except PermissionError:  # another user's, in a folder for all
        return True
    return True


def make_room(folder: Path, size: int) -> None:
    """Removes copies so that `FREE_SHARE` of the disk stays free when so many bytes more lie there,
    as far as there are copies that nobody used for `RECENT_SECONDS`."""
    disk = shutil.disk_usage(folder)
    lack = FREE_SHARE * disk.total + size - disk.free
    if lack <= 0:
        return
    removed = 0
    for unused_since, path, freed in sorted(_files(folder)):
        if lack <= 0 or unused_since > time.time() - RECENT_SECONDS:
            break
        path.unlink(missing_ok=True)
        lack, removed = lack - freed, removed + 1
    if removed:
        _LOG.info("%s: the disk is full, %d old copies were removed", folder, removed)


def _files(folder: Path) -> Iterator[tuple[float, Path, int]]:
    for path in folder.glob("*/*"):
        try:
            about = path.stat()
        except FileNotFoundError:  # another process makes room too
            continue
        yield about.st_mtime, path, about.st_size
