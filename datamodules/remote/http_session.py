"""Sessions for requests to HTTP servers."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
from contextlib import suppress
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

_HEADER_TIMEOUTS = 2
"""Number of read timeouts within which the whole header of an answer must come; each byte restarts the timeout itself."""

_local = threading.local()


def http_session() -> requests.Session:
    """The session of this thread; a new one after a fork, since processes must not share connections."""
    if getattr(_local, "pid", None) != os.getpid():
        session = requests.Session()
        session.headers["Accept-Encoding"] = "identity"
        for scheme in ("http://", "https://"):
            session.mount(scheme, _Adapter())
        _local.session = session
        _local.pid = os.getpid()
        for name in ("urllib3.connection", "urllib3.connectionpool"):
            logging.getLogger(name).addFilter(_hide_queries)
    found: requests.Session = _local.session
    return found


class _Deadline:
    """A connection that is shut down if the header of an answer does not come in time."""

    sock: Any
    timeout: Any

    def getresponse(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.timeout, int | float):
            return super().getresponse(*args, **kwargs)  # type: ignore[misc]
        is_late = threading.Event()
        timer = threading.Timer(_HEADER_TIMEOUTS * self.timeout, self._end, (is_late,))
        timer.daemon = True
        timer.start()
        try:
            response = super().getresponse(*args, **kwargs)  # type: ignore[misc]
        finally:
            timer.cancel()
        if is_late.is_set():  # http.client takes the end of the connection for the end of the header
            response.close()
            raise TimeoutError("the header of the answer did not come in time")
        return response

    def _end(self, is_late: threading.Event) -> None:
        is_late.set()
        with suppress(OSError, AttributeError):
            self.sock.shutdown(socket.SHUT_RDWR)


class _Connection(_Deadline, HTTPConnection):
    """HTTP with a deadline."""


class _SecureConnection(_Deadline, HTTPSConnection):
    """HTTPS with a deadline."""


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class _Adapter(HTTPAdapter):
    """Opens connections with a deadline, except through a proxy."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}


def _hide_queries(record: logging.LogRecord) -> bool:
    """Remove queries, which may contain signatures, from urllib3's log records."""
    if isinstance(record.args, tuple):
        record.args = tuple(re.sub(r"\?\S*", "?...", a) if isinstance(a, str) else a for a in record.args)
    return True
