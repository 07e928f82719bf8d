"""Copies of objects: found again, and removed where the disk gets full, the oldest first."""

import os
import shutil
import time
from collections import namedtuple
from pathlib import Path

import pytest

from infra import cache

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A disk of 1000 bytes."""

    def usage(_: Path) -> Usage:
        used = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
        return Usage(1000, used, 1000 - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return tmp_path


def copy(folder: Path, number: int, hours: float, size: int = 100) -> Path:
    """A copy that was used so long ago."""
    path = cache.path_of(folder, f"{number:064x}", ".tar")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(size))
    used = time.time() - hours * 3600
    os.utime(path, (used, used))
    return path


def test_nothing_goes_while_there_is_room(disk: Path) -> None:
    kept = [copy(disk, number, hours=50) for number in range(8)]
    cache.make_room(disk, 100)
    assert all(path.exists() for path in kept)


def test_what_was_not_used_for_longest_goes_until_twice_the_spare_is_left(disk: Path) -> None:
    copies = [copy(disk, number, hours=50 - number) for number in range(9)]
    assert cache.found(copies[0])  # used just now
    cache.make_room(disk, 100)
    assert [path.exists() for path in copies] == [True, False, False, *[True] * 6]


def test_what_a_kill_left_half_made_goes_with_the_old_ones(disk: Path) -> None:
    left = disk / cache.UNFINISHED / "half"
    left.parent.mkdir()
    left.write_bytes(bytes(950))
    os.utime(left, (0, 0))
    cache.make_room(disk, 100)
    assert not left.exists()


def test_young_copies_and_files_that_are_none_stay_though_the_disk_is_full(disk: Path) -> None:
    young = [copy(disk, number, hours=0.5) for number in range(8)]
    other = disk / "ab" / "notes.txt"
    other.parent.mkdir()
    other.write_bytes(bytes(200))
    os.utime(other, (0, 0))
    cache.make_room(disk, 100)
    assert all(path.exists() for path in [*young, other])


def test_a_copy_that_is_gone_is_not_found(disk: Path) -> None:
    assert not cache.found(cache.path_of(disk, "0" * 64, ".tar"))
