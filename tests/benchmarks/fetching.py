"""Pictures a second of ingestion, beside img2dataset's on the same list in the same run.

Both download the list that `tests.benchmarks.web` serves, on all cores, with the same number of
requests under way, no second attempts, and the same shards of resized JPEGs with captions and
hashes. A rate is pictures over the seconds from the first request until the last shard is written:
starting Ray or importing OpenCV counts for nobody. Of the 500 hosts ours asks each for 8 at a time
at most, the peer knows no such limit. Memory is that of the whole tree of processes, shared pages
counted once; until the first shards are whole it grows, as their pictures gather.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from infra.machine import cores
from tests.benchmarks.measure import Options, Record
from tests.benchmarks.web import FAULTS, HOSTS, MEDIAN, serving, urls

SETTINGS: dict[str, Any] = {
    "shard_rows": 5000, "size": 256, "resize": "keep_ratio", "quality": 95,
    "timeout": 10, "min_side": 32, "max_aspect": 6.0,
}  # fmt: skip
"""The same for both. Each shrinks as it does by default: img2dataset averages areas of the whole
picture, ours is bicubic with antialiasing from a picture that the decoder may have halved."""
REQUESTS = 512
"""Requests under way for each core, at most. img2dataset's are those of two processes a core, its
fastest on 2 cores among 2 processes with 256 or 512 threads each and 4 with 128 or 256."""

PAUSE = 3.0
"""Seconds between looks at memory: the kernel counts through all pages of all processes for each,
and takes a twentieth of a core for it when that is asked every second."""

_PEER = """
import json, sys
from img2dataset import download
if __name__ == "__main__":
    download(**json.loads(sys.argv[1]))
"""


def fetch(options: Options) -> list[Record]:
    """Pictures/s of ingestion, and of img2dataset where that was asked for."""
    if options.peer:
        _check_peer(options)
    with TemporaryDirectory(prefix="fourm-bench-") as name, serving() as web:
        folder = Path(name)
        rows = list(urls(web.port, options.rows))
        lines = [f"{url},picture {number}\n" for number, (url, _) in enumerate(rows)]
        (folder / "list.csv").write_text("".join(["url,caption\n", *lines]))
        expected = sum(good for _, good in rows)
        web.stats()
        ours = _timed(_our_command(folder), folder, web, expected)
        peer = None
        if options.peer:
            peer = _timed(_peer_command(folder, options), folder, web, expected)
    also = {name: value for name, value in ours.items() if name != "rate"}
    if peer:
        also |= {f"peer_{name}": value for name, value in peer.items() if name != "rate"}
    shape = SETTINGS | {"rows": options.rows, "pictures": expected, "hosts": len(HOSTS),
                        "latency_median": MEDIAN, "failing": round(sum(FAULTS.values()), 2),
                        "requests": REQUESTS * cores()}  # fmt: skip
    return [Record(name="fetch", unit="images/s", ours=ours["rate"], peer=peer and peer["rate"],
                   shape=shape, dtype="uint8", threads=options.threads, also=also)]


def _check_peer(options: Options) -> None:
    remedy = (
        "install it apart (`python -m venv peer && peer/bin/pip install img2dataset "
        "'albumentations<2'`) and name it: --peer-python peer/bin/python"
    )
    if not options.peer_python:
        raise SystemExit(f"no interpreter with img2dataset was named; {remedy}")
    try:
        found = subprocess.run(
            [options.peer_python, "-c", "import img2dataset"], capture_output=True, text=True
        )
    except OSError as error:
        raise SystemExit(f"{options.peer_python} does not run: {error}; {remedy}") from error
    if found.returncode:
        why = found.stderr.strip().rpartition("\n")[2]
        raise SystemExit(f"{options.peer_python} cannot import img2dataset ({why}); {remedy}")


def _our_command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "tests.benchmarks.fetching", str(folder)]


def _peer_command(folder: Path, options: Options) -> list[str]:
    words = {
        "url_list": str(folder / "list.csv"),
        "input_format": "csv",
        "url_col": "url",
        "caption_col": "caption",
        "output_folder": str(folder / "peer"),
        "output_format": "webdataset",
        "number_sample_per_shard": SETTINGS["shard_rows"],
        "image_size": SETTINGS["size"],
        "resize_mode": SETTINGS["resize"],
        "resize_only_if_bigger": True,
        "encode_quality": SETTINGS["quality"],
        "min_image_size": SETTINGS["min_side"],
        "max_aspect_ratio": SETTINGS["max_aspect"],
        "processes_count": 2 * cores(),
        "thread_count": REQUESTS // 2,
        "timeout": SETTINGS["timeout"],
        "retries": 0,
        "compute_hash": "sha256",
        "extract_exif": False,
    }
    script = folder / "peer.py"
    script.write_text(_PEER)
    return [options.peer_python, str(script), json.dumps(words)]


def _ours(folder: Path) -> None:
    """Ingestion as `fourm ingest` does it, without Prefect around it."""
    from infra.addresses import AddressPolicy
    from infra.download import DownloadPolicy
    from infra.ray_session import Embedded
    from infra.runner import Resources, run_stages
    from infra.store import Store
    from tasks.fetch import FetchConfig, fetch_job, make_plan
    from tasks.pictures import PicturePolicy

    store = Store(str(folder / "ours"))
    plan = make_plan(store, str(folder / "list.csv"), shard_rows=SETTINGS["shard_rows"])
    pictures = PicturePolicy(
        resize=SETTINGS["resize"], size=SETTINGS["size"], quality=SETTINGS["quality"],
        min_side=SETTINGS["min_side"], max_aspect=SETTINGS["max_aspect"],
    )  # fmt: skip
    downloads = DownloadPolicy(
        timeout=SETTINGS["timeout"], attempts=1, concurrency=REQUESTS,
        addresses=AddressPolicy(frozenset(HOSTS)),
    )  # fmt: skip
    job = fetch_job(plan, FetchConfig(pictures=pictures, downloads=downloads))
    run_stages(store, [job], target=Embedded(), resources=Resources(workers=cores()))


def _written(folder: Path) -> tuple[int, float]:
    """Pictures that either of the two wrote, and the POSIX second when it was done."""
    name, records = "successes", list((folder / "peer").glob("*_stats.json"))
    if not records:
        name, records = "samples", list((folder / "ours" / "commits").glob("*/*.json"))
    pictures = sum(json.loads(path.read_text())[name] for path in records)
    return pictures, max((path.stat().st_mtime for path in records), default=0.0)


def _timed(command: list[str], folder: Path, web: Any, expected: int) -> dict[str, float]:
    with (folder / "log").open("w") as log, _memory() as memory:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    stats = web.stats()
    found, ended = _written(folder)
    if done.returncode or found != expected:
        tail = (folder / "log").read_text()[-2000:]
        wrong = f"ended with {done.returncode}" if done.returncode else f"{found} of {expected}"
        raise SystemExit(f"{command[:3]}: {wrong} pictures\n{tail}")
    seconds = ended - stats["first"]
    third = max(len(memory) // 3, 1)
    middle = memory[third:-third] or memory
    return {
        "rate": round(expected / seconds, 1),
        "seconds": round(seconds, 1),
        "most_requests": stats["most_open"],
        "server_cores": round(stats["cpu_share"], 3),
        "peak_memory": max(memory),
        "memory_last_over_second_third": round(max(memory[-third:]) / max(middle), 3),
    }


@contextmanager
def _memory() -> Iterator[list[int]]:
    """Bytes of memory of what this process starts, the server apart, every few seconds."""
    samples: list[int] = []
    stop = threading.Event()
    before = {child.pid for child in psutil.Process().children(recursive=True)}

    def watch() -> None:
        while not stop.wait(PAUSE):
            samples.append(sum(_bytes(p) for p in psutil.Process().children(recursive=True)
                               if p.pid not in before))  # fmt: skip

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def _bytes(process: psutil.Process) -> int:
    try:
        full = process.memory_full_info()
    except psutil.Error:
        return 0
    return getattr(full, "pss", full.rss)


if __name__ == "__main__":
    _ours(Path(sys.argv[1]))
