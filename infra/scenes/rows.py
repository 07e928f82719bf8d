"""The list of links that the scenes' server answers to, faults of the real web included."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from infra.scenes.raycast import scene_caption
from infra.scenes.sampling import sample_scene

# Share of each fault among all faults. The first two of them deliver their image in the end.
FAULTS: dict[str, float] = {
    "flaky": 0.20,  # 500 at first, then the image
    "slow": 0.08,  # the image, late
    "dead": 0.28,  # 404
    "gone": 0.10,  # 410
    "html": 0.14,  # a web page under a picture's name
    "truncated": 0.08,  # half a JPEG
    "huge": 0.04,  # a small PNG that claims 60,000 x 60,000 pixels
    "endless": 0.04,  # a body far beyond any picture's size
    "private": 0.04,  # a redirect into somebody's private network
}
DELIVERING = ("img", "flaky", "slow")
KINDS = ("img", *FAULTS)

_PATH = re.compile(rf"/({'|'.join(KINDS)})/(\d{{1,18}})\.jpg")
_SALT = 0x5CE9E5


class Row(NamedTuple):
    """One line of the list.

    Attributes:
        seed: Scene that the link delivers, or None if it delivers no image.
        kind: One of `KINDS`, or "duplicate" for a line that repeats an earlier one.
        path: Path on the server, from its leading slash.
        caption: The scene's caption, also where the image is lost.
    """

    seed: int | None
    kind: str
    path: str
    caption: str


def path_of(kind: str, seed: int) -> str:
    """Path on the server under which a scene is served in one of `KINDS`."""
    return f"/{kind}/{seed}.jpg"


def read_path(path: str) -> tuple[str, int] | None:
    """The kind and the seed behind a path, or None if it is not a scene's."""
    match = _PATH.fullmatch(path)
    return (match[1], int(match[2])) if match else None


def _row(seed: int, fault_rate: float, size: int) -> Row:
    draw = np.random.default_rng((_SALT, seed)).random()
    kind = "img"
    for fault, share in FAULTS.items():
        draw -= share * fault_rate
        if draw < 0:
            kind = fault
            break
    delivered = seed if kind in DELIVERING else None
    return Row(delivered, kind, path_of(kind, seed), scene_caption(sample_scene(seed), size))


def scene_rows(
    first_seed: int,
    count: int,
    fault_rate: float = 0.03,
    duplicate_rate: float = 0.01,
    size: int = 128,
) -> Iterator[Row]:
    """Decide the lines of the list, one scene after the other.

    Args:
        first_seed: Seed of the first scene.
        count: Number of scenes, each of which gets a line.
        fault_rate: Share of lines with a fault, 0..1; which ones depends on their seeds alone.
        duplicate_rate: Share of scenes after which an earlier line is repeated, 0..1.
        size: Side of the images, pixels.

    Yields:
        `count` lines and the repeated ones between them.

    Raises:
        ValueError: If a rate is not in 0..1.
    """
    for name, rate in (("fault_rate", fault_rate), ("duplicate_rate", duplicate_rate)):
        if not 0 <= rate <= 1:
            raise ValueError(f"{name} must be in 0..1, not {rate}")
    for seed in range(first_seed, first_seed + count):
        yield _row(seed, fault_rate, size)
        again, which = np.random.default_rng((_SALT + 1, seed)).random(2)
        if again < duplicate_rate:
            earlier = first_seed + int(which * (seed + 1 - first_seed))
            yield _row(earlier, fault_rate, size)._replace(kind="duplicate")


def write_tsv(
    path: str | Path,
    base_url: str,
    first_seed: int,
    count: int,
    fault_rate: float = 0.03,
    duplicate_rate: float = 0.01,
    size: int = 128,
) -> int:
    """Write the list in the format of CC12M: `url<TAB>caption`, no header.

    Args:
        path: File to write.
        base_url: Address of the server, as in "http://127.0.0.1:8123".
        first_seed: Seed of the first scene.
        count: Number of scenes.
        fault_rate: See `scene_rows`.
        duplicate_rate: See `scene_rows`.
        size: Side of the images, pixels.

    Returns:
        Number of lines.
    """
    lines = 0
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for row in scene_rows(first_seed, count, fault_rate, duplicate_rate, size):
            file.write(f"{base_url.rstrip('/')}{row.path}\t{row.caption}\n")
            lines += 1
    return lines
