"""URLs without credentials, for messages and logs."""

from __future__ import annotations

import re

_CONTAINER_SCHEMES = ("abfs", "abfss")  # here a container precedes the @, not a user


def redact(location: str) -> str:
    """A path or URL without user, password, query and fragment."""
    # fsspec chains URLs with "::".
    return "::".join(_redact(part) for part in re.split(r"::(?=[A-Za-z][\w+.-]*(?:://|::))", location))


def redact_urls(text: str) -> str:
    """A text in which every URL is redacted."""
    return re.sub(r"[A-Za-z][\w+.-]*://[^\s'\"<>\\]+", lambda found: redact(found[0]), text)


def _redact(url: str) -> str:
    scheme, mark, rest = url.partition("://")
    if not mark or scheme == "file":
        return url
    authority, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    user, at, host = authority.rpartition("@")
    if scheme in _CONTAINER_SCHEMES and ":" not in user:
        host = user + at + host
    # A colon must precede a port; otherwise the text after it may be part of a password that was not percent-encoded.
    if not re.fullmatch(r"(\[[\w:.%]*\]|[^:]*)(:\d*)?", host):
        return f"{scheme}://..."
    return f"{scheme}://{host}{slash}{path}"
