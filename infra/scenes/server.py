"""A local web server of scenes, with the faults of the real web.

Rendering runs in a small pool of processes and the server itself in a process of its own, so
that a program which fetches from it keeps its interpreter to itself:

    python -m infra.scenes.server --first-seed 0 --count 1000 --port 8123
"""

from __future__ import annotations

import argparse
import asyncio
import io
import logging
import multiprocessing
import os
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from infra.scenes.raycast import render
from infra.scenes.rows import Row, read_path, scene_rows, write_tsv
from infra.scenes.sampling import sample_scene

if TYPE_CHECKING:
    from aiohttp import web

__all__ = ["SceneServer", "scene_jpeg", "scene_rows", "write_tsv"]

HOST = "127.0.0.1"
SLOW_SECONDS = 1.0
ENDLESS_BYTES = 64 << 20
PRIVATE_URL = "http://10.255.255.1/picture.jpg"

_QUALITY = 95
_START_SECONDS = 60

_log = logging.getLogger("fourm.scenes")


def scene_jpeg(seed: int, size: int = 128) -> bytes:
    """The scene of a seed as a JPEG file of `size` x `size` pixels, full colour resolution."""
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.fromarray(render(sample_scene(seed), size).rgb)
    image.save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
    return buffer.getvalue()


def _huge_png() -> bytes:
    """A valid start of a PNG whose header claims more pixels than anyone should decode."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(60_000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def _die_with_parent() -> None:
    """Let a pool's process end when the server is killed; it would wait forever otherwise."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


class _Site:
    """Answers to the paths of `rows.path_of`."""

    def __init__(self, first_seed: int, count: int, size: int, pool: ProcessPoolExecutor) -> None:
        self._seeds = range(first_seed, first_seed + count)
        self._size = size
        self._pool = pool
        self._refused: set[int] = set()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import web

        target = read_path(request.path)
        if target is None or target[1] not in self._seeds:
            return web.Response(status=404, text="not found")
        kind, seed = target
        if kind == "flaky" and seed not in self._refused:
            self._refused.add(seed)
            return web.Response(status=500, text="try again")
        if kind == "slow":
            await asyncio.sleep(SLOW_SECONDS)
        if kind in ("img", "flaky", "slow", "truncated"):
            loop = asyncio.get_running_loop()
            body = await loop.run_in_executor(self._pool, scene_jpeg, seed, self._size)
            body = body[: len(body) // 2] if kind == "truncated" else body
            return web.Response(body=body, content_type="image/jpeg")
        return self._refuse(kind)

    def _refuse(self, kind: str) -> web.Response:
        from aiohttp import web

        if kind == "html":
            page = "<!doctype html><title>Sorry</title><p>This picture has moved.</p>"
            return web.Response(text=page, content_type="text/html")
        if kind == "huge":
            return web.Response(body=_huge_png(), content_type="image/png")
        if kind == "endless":
            return web.Response(body=_endless(), content_type="image/jpeg")
        if kind == "private":
            return web.Response(status=302, headers={"Location": PRIVATE_URL})
        return web.Response(status=410 if kind == "gone" else 404, text=kind)


async def _endless() -> AsyncIterator[bytes]:
    block = b"\xff\xd8\xff\xe0" + bytes((1 << 16) - 4)
    for _ in range(ENDLESS_BYTES >> 16):
        yield block


async def _serve(site: _Site, port: int, with_parent: bool) -> None:
    from aiohttp import web

    app = web.Application()
    app.router.add_get("/{path:.*}", site.answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, HOST, port).start()
    _, bound = runner.addresses[0][:2]
    sys.stdout.write(f"http://{HOST}:{bound}\n")
    sys.stdout.flush()
    try:
        if with_parent:
            await asyncio.to_thread(sys.stdin.read)
        else:
            await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def main() -> None:
    """Serve until interrupted; the first line of output is the server's address."""
    parser = argparse.ArgumentParser(description="Serve rendered scenes over HTTP.")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--size", type=int, default=128, help="side of the images, pixels")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--with-parent", action="store_true", help="end when stdin closes")
    args = parser.parse_args()
    pool = ProcessPoolExecutor(
        args.workers, multiprocessing.get_context("spawn"), initializer=_die_with_parent
    )
    site = _Site(args.first_seed, args.count, args.size, pool)
    try:
        asyncio.run(_serve(site, args.port, args.with_parent))
    except KeyboardInterrupt:
        _log.info("interrupted")
    finally:
        pool.shutdown(cancel_futures=True)


class SceneServer:
    """A server in a process of its own, for the length of a `with` block.

    Args:
        first_seed: Seed of the first scene.
        count: Number of scenes; others are not found.
        size: Side of the images, pixels.
        port: Fixed port, for links that outlive a restart; 0 takes a free one.
        fault_rate: Share of faulty lines in `rows` and `write_tsv`, 0..1.
        workers: Processes that render; None takes up to two.
    """

    def __init__(
        self,
        first_seed: int,
        count: int,
        size: int = 128,
        port: int = 0,
        fault_rate: float = 0.03,
        workers: int | None = None,
    ) -> None:
        self.first_seed = first_seed
        self.count = count
        self.size = size
        self.port = port
        self.fault_rate = fault_rate
        self._workers = workers or min(2, os.cpu_count() or 1)
        self._process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        """Address without a trailing slash."""
        return f"http://{HOST}:{self.port}"

    def rows(self, duplicate_rate: float = 0.01) -> Iterator[Row]:
        """The lines of this server's list; see `scene_rows`."""
        return scene_rows(
            self.first_seed, self.count, self.fault_rate, duplicate_rate, self.size
        )

    def write_tsv(self, path: str | Path, duplicate_rate: float = 0.01) -> int:
        """Write this server's list and return its number of lines; see `rows.write_tsv`."""
        return write_tsv(
            path, self.url, self.first_seed, self.count, self.fault_rate, duplicate_rate, self.size
        )

    def __enter__(self) -> SceneServer:
        command = [sys.executable, "-m", "infra.scenes.server", "--with-parent"]
        for name in ("first_seed", "count", "size", "port", "_workers"):
            command += ["--" + name.strip("_").replace("_", "-"), str(getattr(self, name))]
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        # Arrays are small: one thread a process is fastest.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            start_new_session=True,  # an interrupt at the keyboard is for the caller to handle
        )
        self.port = self._await_port(self._process)
        return self

    def _await_port(self, process: subprocess.Popen[str]) -> int:
        assert process.stdout is not None
        watchdog = threading.Timer(_START_SECONDS, process.kill)
        watchdog.start()
        line = process.stdout.readline().strip()
        watchdog.cancel()
        if not line:
            process.wait()
            raise ValueError(
                f"the scene server did not start on port {self.port}; if the port is taken, "
                "choose another one or stop the program that holds it"
            )
        return int(line.rsplit(":", 1)[1])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        self._process = None


if __name__ == "__main__":
    main()
