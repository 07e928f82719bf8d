"""Which rows of a list ask for the same picture: digests of their URLs, compared outside memory."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

_BUCKET_ROWS = 2_000_000


def url_digest(url: str, problem: str | None) -> bytes:
    """8 bytes that are equal for rows which ask for the same picture."""
    # A bad row is never downloaded: others of its URL do not repeat it.
    text = f"\0{url}\0{problem}" if problem else url
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()


def first_seen(path: Path, rows: int) -> np.ndarray:
    """Of each row the first one with the same URL, int32 [rows], in a file beside the digests.

    Rows are compared in buckets of equal digests modulo a number, a bucket at a time in memory.
    """
    digests = np.memmap(path, "<u8", "r", shape=(rows,))
    first = np.memmap(path.with_name("first"), "<i4", "w+", shape=(rows,))
    buckets = -(-rows // _BUCKET_ROWS)
    for bucket in range(buckets):
        found = [
            np.flatnonzero(digests[at : at + _BUCKET_ROWS] % buckets == bucket) + at
            for at in range(0, rows, _BUCKET_ROWS)
        ]
        index = np.concatenate(found)
        if not len(index):
            continue
        order = index[np.argsort(digests[index], kind="stable")]
        values = digests[order]
        starts = np.concatenate([[True], values[1:] != values[:-1]])
        first[order] = order[starts][np.cumsum(starts) - 1]
    return first
