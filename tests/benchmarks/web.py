"""A web of many hosts on this machine, with the latencies and the failures of the real one.

Runs in a process of its own and does next to nothing for a request: bodies lie ready, latency is
waited for, HTTP is parsed as far as a path. What becomes of a URL is written in it, so that every
client gets the same; shares of failures are those of CC12M's list in 2026, a third of it dead.

    python -m tests.benchmarks.web          # prints its port, ends when stdin closes
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import random
import resource
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import uvloop
from PIL import Image

HOSTS = tuple(f"127.0.{i // 250}.{i % 250 + 2}" for i in range(500))
FAULTS = {
    "missing": 0.12, "forbidden": 0.08, "refused": 0.03, "reset": 0.03, "silent": 0.05,
    "page": 0.04,
}  # fmt: skip
"""Kind of failure to its share of the URLs; all others are pictures."""
MEDIAN, SPREAD, LONGEST = 0.15, 1.0, 8.0
"""Latency: log-normal with this median in seconds, a mean of 0.25 and 1 % above 1.5."""
PICTURES = 200
SIDES, ASPECTS = (400, 800), (1.0, 1.6)
"""Shorter sides in pixels and ratios of the sides, as CC12M chose them: no side below 400."""
CLOSED_PORT = 9

_STATS = "/stats"


def urls(port: int, count: int) -> Iterator[tuple[str, bool]]:
    """URLs, and whether each leads to a picture; the n-th is always the same but for the port."""
    rng = random.Random(0)
    kinds, shares = [*FAULTS, "picture"], [*FAULTS.values(), 1 - sum(FAULTS.values())]
    for number in range(count):
        kind = rng.choices(kinds, shares)[0]
        at = CLOSED_PORT if kind == "refused" else port
        yield f"http://{rng.choice(HOSTS)}:{at}/{kind}/{number}.jpg", kind == "picture"


def latencies(count: int = 10_000) -> list[float]:
    """Seconds until the server answers, for one URL after the other and then again."""
    rng = random.Random(1)
    return [min(MEDIAN * math.exp(rng.gauss(0, SPREAD)), LONGEST) for _ in range(count)]


def photo(seed: int) -> bytes:
    """A JPEG of some 100 kB with structure at all scales, as photos have."""
    rng = np.random.default_rng(seed)
    short = int(rng.integers(*SIDES))
    sides = (int(short * rng.uniform(*ASPECTS)), short)
    width, height = sides if rng.random() < 0.7 else sides[::-1]
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(2, 9):
        noise = rng.integers(0, 255, (1 << octave, 1 << octave, 3), dtype=np.uint8)
        layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(layer, np.float32) / 1.7**octave
    total = (total - total.min()) * (255 / np.ptp(total))
    buffer = io.BytesIO()
    Image.fromarray(total.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


class _Photos:
    """Bodies that all differ in their pixels: steps of quantisation vary from URL to URL."""

    def __init__(self) -> None:
        self._bodies = [photo(seed) for seed in range(PICTURES)]
        # The first table of a JPEG file: marker, two bytes of length, one of number, 64 of steps.
        self._steps = [body.index(b"\xff\xdb") + 5 for body in self._bodies]

    def body(self, number: int) -> bytearray:
        variant, base = divmod(number, PICTURES)
        body, at = bytearray(self._bodies[base]), self._steps[base]
        while variant:  # the digits of the variant, on the steps of low frequencies
            at += 1
            variant, more = divmod(variant, 3)
            body[at] += more
        return body


class _Stats:
    """What clients did since the last time somebody asked."""

    def __init__(self) -> None:
        self.first = 0.0
        self.last = 0.0
        self.open = self.most_open = 0
        self.cpu = _cpu_seconds()

    def begin(self) -> None:
        self.first = self.first or time.time()
        self.open += 1
        self.most_open = max(self.most_open, self.open)

    def end(self) -> None:
        self.open -= 1
        self.last = time.time()

    def take(self) -> bytes:
        report = {
            "first": self.first,
            "most_open": self.most_open,
            "cpu_share": (_cpu_seconds() - self.cpu) / max(self.last - self.first, 1e-9),
        }
        self.__init__()  # type: ignore[misc]
        return json.dumps(report).encode()


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class _Connection(asyncio.Protocol):
    """HTTP/1.1 as far as a GET; one request at a time, kept alive unless the client says no."""

    def __init__(self, photos: _Photos, stats: _Stats, latencies: list[float]) -> None:
        self._photos, self._stats, self._latencies = photos, stats, latencies
        self._received = b""
        self._busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by their class

    def connection_lost(self, error: Exception | None) -> None:
        self._done()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._received.endswith(b"\r\n\r\n"):
            return
        head, self._received = self._received, b""
        path = head.split(b" ", 2)[1].decode()
        keep = b"connection: close" not in head.lower()
        if path == _STATS:
            self._send(200, "application/json", self._stats.take(), keep)
            return
        self._busy = True
        self._stats.begin()
        _, kind, name = path.split("/")
        number = int(name.partition(".")[0])
        if kind != "silent":
            loop = asyncio.get_running_loop()
            wait = self._latencies[number % len(self._latencies)]
            loop.call_later(wait, self._answer, kind, number, keep)

    def _answer(self, kind: str, number: int, keep: bool) -> None:
        if self._transport.is_closing():
            return
        if kind == "picture":
            self._send(200, "image/jpeg", self._photos.body(number), keep)
        elif kind == "page":
            self._send(200, "text/html", b"<html><body>This picture has moved</body></html>", keep)
        elif kind == "reset":
            linger = struct.pack("ii", 1, 0)  # closing at once makes it a reset
            self._transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, linger
            )
            self._transport.abort()
        else:
            self._send(403 if kind == "forbidden" else 404, "text/plain", b"no", keep)

    def _send(self, status: int, kind: str, body: bytes | bytearray, keep: bool) -> None:
        head = (
            f"HTTP/1.1 {status} -\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            f"Connection: {'keep-alive' if keep else 'close'}\r\n\r\n"
        )
        self._transport.writelines([head.encode(), body])
        if not keep:
            self._transport.close()
        self._done()

    def _done(self) -> None:
        if self._busy:
            self._busy = False
            self._stats.end()


async def _serve() -> None:
    loop, photos, stats, waits = asyncio.get_running_loop(), _Photos(), _Stats(), latencies()
    with socket.socket() as free:
        free.bind((HOSTS[0], 0))
        port = free.getsockname()[1]
    await loop.create_server(
        lambda: _Connection(photos, stats, waits), list(HOSTS), port, backlog=1024
    )
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)


class Web:
    """The server's process, as its user sees it."""

    def __init__(self, port: int) -> None:
        self.port = port

    def stats(self) -> dict[str, float]:
        """Since the last time: POSIX second of the first request, most_open, cpu_share."""
        with urllib.request.urlopen(f"http://{HOSTS[0]}:{self.port}{_STATS}") as answer:
            return json.loads(answer.read())


@contextmanager
def serving() -> Iterator[Web]:
    """The web, for the length of the block."""
    command = [sys.executable, "-m", "tests.benchmarks.web"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield Web(int(process.stdout.readline()))
        process.stdin.close()


if __name__ == "__main__":
    uvloop.run(_serve())  # real servers have machines of their own: this one takes little of ours
