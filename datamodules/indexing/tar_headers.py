"""Headers of tar archives, read with bounds."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import Self

BLOCK_BYTES = tarfile.BLOCKSIZE
"""Size of a header, and the unit in which members are stored, in bytes."""

MAX_MEMBER_BYTES = 256 << 20
"""Maximum size of a sample's member; larger ones are bad, since a damaged header can state any size."""

_MAX_EXTENDED_BYTES = 1 << 20
"""Maximum size of an extended header, which holds long names; ``tarfile`` would reserve the memory for any size."""

_EXTENDED_TYPES = frozenset(
    {
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    }
)

READ_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, OSError)
"""What ``tarfile`` raises on damaged or hostile archives: also for offsets beyond 64 bits and thousands of extended headers."""


def describe(error: Exception) -> str:
    """What is wrong with an archive, for one of the ``READ_ERRORS``."""
    if isinstance(error, RecursionError):
        return "thousands of extended headers"
    if isinstance(error, OverflowError):
        return "a size beyond 64 bits"
    return str(error).partition("\n")[0]


class BoundedTarInfo(tarfile.TarInfo):
    """A header reader that refuses negative sizes and extended headers without bound."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if info.type in _EXTENDED_TYPES and info.size > _MAX_EXTENDED_BYTES:
            raise tarfile.ReadError(f"an extended header of {info.size} bytes, more than {_MAX_EXTENDED_BYTES}")
        check_size(info)
        return info


def check_size(info: tarfile.TarInfo) -> None:
    """Refuse a negative size, after which ``tarfile`` would read the same headers for ever.

    An extended header can replace the size, so this must be called for each complete member too.

    Raises:
        tarfile.ReadError: If the size is negative.
    """
    if info.size < 0:
        raise tarfile.ReadError(f"a member of {info.size} bytes")


def read_headers(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of an archive that was opened with :class:`BoundedTarInfo`.

    Raises:
        tarfile.TarError: If the archive is damaged; ``READ_ERRORS`` lists all that can be raised.
    """
    for info in archive:
        check_size(info)
        yield info


def is_header_of(header: bytes, name: bytes, size: int) -> bool:
    """Whether a block is the header of a regular member with this name and size, in bytes.

    The case of letters is ignored. Names that do not fit into the block or are not ASCII are stored in an extended header, so
    only the sizes of these members are compared.
    """
    is_same = header[: len(name) + 1] == name + b"\0" and header[124:135] == b"%011o" % size
    if is_same and header[156:157] in tarfile.REGULAR_TYPES:
        return True  # nearly all members
    try:
        info = BoundedTarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    if not info.isreg() or info.size != size:
        return False
    if len(name) >= tarfile.LENGTH_NAME or not name.isascii():
        return True
    return info.name.encode("utf-8", "surrogateescape").lower() == name.lower()
