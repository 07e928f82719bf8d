"""A proxy before an S3 service that answers as a busy or broken one does, when a test says so."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Plan = Callable[[str, str, Any], str]
"""(method, path, headers) -> one of FAULTS, or "" to pass the request on."""

_ERRORS = {
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "500": (500, "InternalError", "We encountered an internal error."),
    "409": (409, "ConditionalRequestConflict", "A conflicting operation is under way."),
    "412": (412, "PreconditionFailed", "At least one of the preconditions did not hold."),
}
FAULTS = (*_ERRORS, "reset", "lost", "cut", "stall")
"""Error answers; reset: before the request is read; lost: done, but the answer never arrives;
cut: half of the answer's body arrives; stall: silence longer than the client waits."""


class FaultProxy(ThreadingHTTPServer):
    """Forwards to `upstream` except where `plan` says otherwise; counts what it did.

    Args:
        upstream: "http://host:port".
        stall: seconds of silence.
    """

    daemon_threads = True

    def __init__(self, upstream: str, plan: Plan, *, stall: float = 2.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.plan, self.stall = plan, stall
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Address that clients are given."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up on purpose here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def _any(self) -> None:
        with self.server.lock:
            fault = self.server.plan(self.command, self.path, self.headers)
            self.server.counts[fault or "passed"] += 1
        if fault == "reset":
            return self._reset()
        body = self._body()
        if fault == "stall":
            time.sleep(self.server.stall)
            return self._reset()
        if fault in _ERRORS:
            return self._error(*_ERRORS[fault])
        answer, content = self._forward(body)
        if fault == "lost":
            return self._reset()
        self._answer(answer, content, cut=fault == "cut")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _any

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _forward(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        dropped = ("connection", "transfer-encoding", "expect", "content-length")
        headers = {k: v for k, v in self.headers.items() if k.lower() not in dropped}
        headers["Content-Length"] = str(len(body))
        upstream.request(self.command, self.path, body=body, headers=headers)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        return answer, content

    def _answer(self, answer: http.client.HTTPResponse, content: bytes, *, cut: bool) -> None:
        self.send_response(answer.status, answer.reason)
        for name, value in answer.getheaders():
            skipped = ("connection", "transfer-encoding", "content-length", "date", "server")
            if name.lower() not in skipped:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if cut and content:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            return self._reset()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _error(self, status: int, code: str, message: str) -> None:
        text = (
            f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code>'
            f"<Message>{message}</Message></Error>"
        ).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _reset(self) -> None:
        """End the connection with a RST, as a machine that goes away does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""


@contextmanager
def fault_proxy(upstream: str, plan: Plan, *, stall: float = 2.0) -> Iterator[FaultProxy]:
    """A running proxy for the length of the block."""
    proxy = FaultProxy(upstream, plan, stall=stall)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join(10)
