"""An HTTP server on the loopback device that fails on request."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Fault = str | int | None


@dataclass(frozen=True)
class Request:
    """A request that the server received."""

    method: str
    path: str
    headers: dict[str, str]


class FaultyServer(ThreadingHTTPServer):
    """Serves the files of a folder by GET and HEAD, with configured faults.

    A fault is a status, or one of ``drop`` (the connection is closed without a response), ``truncate`` (after half of
    the body), ``stall`` (the second half is never sent), ``long`` (``Content-Length`` is too large by 10), ``short``
    (too small by 10), ``gzip`` (a false ``Content-Encoding``), ``shift`` (a range that was not requested), ``redirect``,
    ``not tar`` (the right number of wrong bytes), ``silent`` (no response), ``slow header`` and ``drip`` (a byte at a time),
    and ``endless`` (zeros without end after the body, whose length is not stated).

    Attributes:
        faults: Faults of the next requests, one each.
        fault: Fault of all later requests, or a function from a request's path to its fault.
        ranges: Whether the server supports ``Range``.
        conditions: Whether the server supports ``If-Range``.
        etags: Whether files have an ``ETag``.
        etag_prefix: Beginning of each ``ETag``; ``W/`` marks weak ones.
        retry_after: Value of this header in responses with status 429 and 503.
        chunked: Whether bodies are sent without ``Content-Length``.
        length: ``Content-Length`` in place of the right one.
        requests: All requests that were received.
        sent: Number of bytes of all bodies that were sent.
        stalling: Number of responses that are being held back.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: deque[Fault] = deque()
        self.fault: Fault | Callable[[str], Fault] = None
        self.ranges = True
        self.conditions = True
        self.etags = True
        self.etag_prefix = ""
        self.chunked = False
        self.length: str | None = None
        self.retry_after: str | None = None
        self.requests: list[Request] = []
        self.sent = 0
        self.stalling = 0
        self.lock = threading.Lock()
        self.released = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self, request: Request) -> Fault:
        with self.lock:
            self.requests.append(request)
            if self.faults:
                return self.faults.popleft()
        return self.fault(request.path) if callable(self.fault) else self.fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving; a server of which only the socket is closed would go on polling it, at the cost of a whole core."""
        self.released.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(None)

    def do_GET(self) -> None:
        self._answer(self.headers.get("Range") if self.server.ranges else None)

    def _answer(self, range_: str | None) -> None:
        path = self.path.partition("?")[0]
        fault = self.server.next_fault(Request(self.command, self.path, dict(self.headers)))
        file = self.server.folder / path.lstrip("/")
        if isinstance(fault, int) or not file.is_file():
            self._refuse(fault if isinstance(fault, int) else 404)
        elif fault == "drop":
            self.close_connection = True
        elif fault == "silent":
            self.server.released.wait()
            self.close_connection = True
        elif fault == "slow header":
            self._drip(b"HTTP/1.1 200 OK\r\nX: " + bytes(10_000).replace(b"\0", b"x"))
        elif fault == "redirect":
            self.send_response(302)
            self.send_header("Location", f"{path}?secret-of-the-server=1")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send(file.read_bytes(), range_, fault)

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        if self.server.retry_after is not None and status in (429, 503):
            self.send_header("Retry-After", self.server.retry_after)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, data: bytes, range_: str | None, fault: Fault) -> None:
        etag = f'{self.server.etag_prefix}"{hashlib.sha256(data).hexdigest()[:8]}"'
        total = len(data)
        if fault == "not tar":
            data = bytes(total)
        if range_ is not None and (self.headers.get("If-Range", etag) == etag or not self.server.conditions):
            first, last = _bounds(range_, total)
            if fault == "shift":
                first += 1
            data = data[first : last + 1]
            if not data:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
            else:
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{total}")
        else:
            self.send_response(200)
        if self.server.etags:
            self.send_header("ETag", etag)
        if fault == "gzip":
            self.send_header("Content-Encoding", "gzip")
        if self.server.chunked or fault == "endless":
            self.close_connection = True
        elif self.server.length is not None:
            self.send_header("Content-Length", self.server.length)
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(data) + {"long": 10, "short": -10}.get(str(fault), 0)))
        self.end_headers()
        if self.command == "GET":
            self._write(data, fault)

    def _drip(self, data: bytes) -> None:
        for byte in data:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            if self.server.released.wait(0.05):
                break
        self.close_connection = True

    def _write(self, data: bytes, fault: Fault) -> None:
        if fault == "drip":
            self._drip(data)
            return
        if fault in ("truncate", "stall"):
            data = data[: len(data) // 2]
        with self.server.lock:  # before a client can have read it
            self.server.sent += len(data)
        self.wfile.write(data)
        while fault == "endless" and not self.server.released.is_set():
            self.server.sent += self.wfile.write(bytes(1 << 16))
        if fault == "stall":
            self.server.stalling += 1
            self.server.released.wait()
            self.server.stalling -= 1
        if fault in ("truncate", "stall", "long", "short"):
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


def _bounds(range_: str, total: int) -> tuple[int, int]:
    first, _, last = range_.removeprefix("bytes=").partition("-")
    return int(first), min(int(last) if last else total, total - 1)
