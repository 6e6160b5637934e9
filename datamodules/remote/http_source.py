"""Objects on HTTP and HTTPS servers."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime

import requests
import urllib3

from lit_lora.datamodules.remote.http_session import http_session
from lit_lora.datamodules.remote.pace import Pace
from lit_lora.datamodules.remote.remote_source import (
    PIECE_BYTES,
    RETRIED_STATUS,
    RemoteError,
    RemoteSource,
    Stated,
    Stream,
    TransientError,
    in_words,
)

_MISSING = {404, 410}
_ACTIONS = {
    401: "give credentials that the server accepts",
    403: "check the credentials and the permissions, and whether a signed URL has expired",
    404: "check the name",
    410: "check the name",
}
_WRONG_RANGE = "the server answered with a range that was not requested"
_PASSING = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


class HttpSource(RemoteSource):
    """An object on an HTTP server, read by range requests if the server supports them."""

    def __init__(self, location: str, timeout: float) -> None:
        super().__init__(location, timeout)
        self._read: tuple[str | None, str | None, int | None] | None = None

    @contextmanager
    def open(self, start: int) -> Iterator[Stream]:
        with self._get(self._range_from(start)) as response:
            first, total = _place(response)
            read = (response.headers.get("ETag"), response.headers.get("Last-Modified"), total)
            fits = response.status_code == 200 or (first == start and read == self._read)
            if fits:
                self._read = read
                self.stated = _stated(response)
                yield Stream(first, total, self._pieces(response))
                return
        if start == 0:
            raise TransientError(_WRONG_RANGE)
        # The object has changed, so its rest must not be appended to the bytes read before.
        with self.open(0) as stream:
            yield stream

    def read(self, offset: int, size: int) -> bytes:
        with self._get({"Range": f"bytes={offset}-{offset + size - 1}"}) as response:
            first, _ = _place(response)
            if response.status_code == 416:
                return b""
            if response.status_code == 206 and first != offset:
                raise TransientError(_WRONG_RANGE)
            data = bytearray()
            for piece in self._pieces(response):
                data += piece[max(offset - first, 0) :]
                first += len(piece)
                if len(data) >= size:
                    break
            return bytes(data[:size])

    def size(self) -> int | None:
        # Not HEAD, since signed URLs often allow only GET.
        with self._get({"Range": "bytes=0-0"}) as response:
            return _place(response)[1]

    def ranged_size(self) -> int | None:
        with self._get({"Range": "bytes=0-0"}) as response:
            return _place(response)[1] if response.status_code == 206 else None

    def current(self) -> Stated:
        with self._get({"Range": "bytes=0-0"}) as response:
            return _stated(response)

    def _range_from(self, start: int) -> dict[str, str]:
        if start == 0:
            return {}
        headers = {"Range": f"bytes={start}-"}
        if etag := self.stated.version:  # weak ETags are not allowed here (RFC 9110, 13.1.5)
            headers["If-Range"] = etag
        return headers

    def _get(self, headers: Mapping[str, str]) -> requests.Response:
        """Send a request; the response is the object, a range of it, or status 416 for a missing range."""
        try:
            response = http_session().get(self.location, headers=headers, stream=True, timeout=self.timeout)
        except requests.RequestException as error:
            raise self._failure(error) from None
        status = response.status_code
        if status not in (200, 206, 416) or (status == 416 and not headers):
            response.close()
            reason = f"HTTP status {status}"
            if status in RETRIED_STATUS:
                raise TransientError(reason, wait=_retry_after(response))
            raise self.error(reason, _ACTIONS.get(status, "check the URL"), missing=status in _MISSING)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            response.close()
            raise self.error("the server compresses it", "turn off compression of *.tar on the server")
        return response

    def _pieces(self, response: requests.Response) -> Iterator[bytes]:
        # Unlike `iter_content`, `read1` (since urllib3 2.1) returns what has come, so that a slow server is noticed.
        read = getattr(response.raw, "read1", response.raw.read)
        pace = Pace(self.timeout)
        while True:
            before = time.monotonic()
            try:
                piece = read(PIECE_BYTES)
            except urllib3.exceptions.HTTPError as error:
                raise TransientError(in_words(error)) from None
            waited = time.monotonic() - before
            if not piece:
                return
            yield piece
            pace.add(len(piece), waited)

    def _failure(self, error: requests.RequestException) -> RemoteError | TransientError:
        """Convert an exception to an error of this package by its type, since the message contains the URL."""
        inner = error.args[0] if error.args else None
        inner = getattr(inner, "reason", inner)
        reason = in_words(inner if isinstance(inner, Exception) else error)
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return self.error("the certificate of the server is not trusted", "check the address or the certificates")
        if isinstance(error, _PASSING):
            return TransientError(reason)
        return self.error(reason, "check the URL")


def _strong(etag: str | None) -> str | None:
    """An ETag that changes with each byte; None for a weak one (``W/…``), which may stay the same."""
    return None if not etag or etag.startswith("W/") else etag


def _stated(response: requests.Response) -> Stated:
    etag = response.headers.get("ETag")
    return Stated(_strong(etag), etag or response.headers.get("Last-Modified"))


def _place(response: requests.Response) -> tuple[int, int | None]:
    """Offset of the body's first byte in the object, and size of the object in bytes if it is known."""
    if response.status_code == 200:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if re.fullmatch(r"\d{1,18}", length) else None
    match = re.fullmatch(
        r"bytes (?:(\d{1,18})-\d{1,18}|\*)/(\d{1,18}|\*)", response.headers.get("Content-Range", "").strip()
    )
    if match is None:
        if response.status_code == 416:
            return 0, None
        raise TransientError("the server answered with a range but did not state which")
    return int(match[1] or 0), None if match[2] == "*" else int(match[2])


def _retry_after(response: requests.Response) -> float:
    """Seconds to wait according to the header ``Retry-After``; 0 without one."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0
