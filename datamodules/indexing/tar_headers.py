"""Reading of a tar's headers, which may be damaged or made to do harm."""

from __future__ import annotations

import errno
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from lit_lora.errors import UserError
from lit_lora.visible import visible

BLOCK_BYTES = tarfile.BLOCKSIZE
"""Size of a header, and the unit in which members are stored, in bytes."""

MAX_MEMBER_BYTES = 256 << 20
"""Maximum size of a sample's member; larger ones are bad, since a damaged header can state any size."""

READ_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, OSError)
"""What ``tarfile`` raises on damaged or hostile archives: also for offsets beyond 64 bits and thousands of extended headers."""

_END_MARKER_BYTES = 1024
_MAX_EXTENDED_BYTES = 1 << 20
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_UNPACK = {"gzip": "gunzip", "bzip2": "bunzip2", "xz": "unxz", "zstd": "unzstd", "lz4": "unlz4"}

_STREAMED = ("gzip", "bzip2", "xz")  # which Python's tarfile decompresses

_COMPRESSED_NAMES = (".tgz", ".tbz2", ".txz", ".tzst", *(f".tar.{end}" for end in ("gz", "bz2", "xz", "zst", "lz4")))


class BoundedTarInfo(tarfile.TarInfo):
    """A header whose extensions (long names, PAX records) are read only if they have a plausible size."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        check_size(info)
        if info.type in _EXTENDED and info.size > _MAX_EXTENDED_BYTES:
            raise tarfile.ReadError(f"an extended header of {info.size} bytes, more than {_MAX_EXTENDED_BYTES}")
        return info


def walk_headers(path: Path, file: io.BufferedReader) -> Iterator[tarfile.TarInfo]:
    """Yield the header of each member of a tar, in the order of the archive.

    The data of every member that is yielded lies within the file.

    Args:
        path: Path of the shard, for messages.
        file: The shard, open for reading.

    Raises:
        UserError: If the shard is compressed, truncated or damaged.
        OSError: If the file cannot be read.
    """
    size = path.stat().st_size
    _refuse_compressed(path, file)
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=BoundedTarInfo) as archive:
            while (info := archive.next()) is not None:
                check_size(info)
                if archive.offset <= end:
                    raise tarfile.ReadError(f"a member of {info.size} bytes")
                if archive.offset > size:
                    end = size
                    raise tarfile.ReadError("unexpected end of data")
                yield info
                end = archive.offset
                archive.members.clear()  # type: ignore[attr-defined]  # otherwise all headers would stay in memory
    except Exception as error:  # tarfile raises almost any exception on headers that were made to do harm
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL is a seek to an impossible place
            raise
        raise damaged(path, end, describe(error) or type(error).__name__) from error
    _check_end(path, file, end)


def damaged(path: Path, offset: int, reason: str) -> UserError:
    """The error for a shard that cannot be read from some byte on."""
    return UserError(
        f"{visible(path)} is truncated or damaged at byte {offset} ({visible(reason)}); pack it again or remove it"
    )


def describe(error: Exception) -> str:
    """What is wrong with an archive, for one of the ``READ_ERRORS``."""
    if isinstance(error, RecursionError):
        return "too many extended headers in a row"
    if isinstance(error, OverflowError):
        return "a size beyond 64 bits"
    return str(error).partition("\n")[0]


def check_size(info: tarfile.TarInfo) -> None:
    """Refuse a negative size, after which ``tarfile`` would read the same headers for ever.

    An extended header can replace the size, so this must be called for each complete member too.

    Raises:
        tarfile.ReadError: If the size is negative.
    """
    if info.size < 0:
        raise tarfile.ReadError(f"a member of {info.size} bytes")


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


def is_compressed_tar(name: str) -> bool:
    """Whether a file is a compressed tar by its name."""
    return name.lower().endswith(_COMPRESSED_NAMES)


def _refuse_compressed(path: Path, file: io.BufferedReader) -> None:
    file.seek(0)
    beginning = file.read(8)
    file.seek(0)
    if name := next((name for magic, name in _COMPRESSED.items() if beginning.startswith(magic)), ""):
        stream = ", or stream it with WebDatasetStreamDataModule" if name in _STREAMED else ""
        raise UserError(
            f"{visible(path)} is compressed ({name}), so samples in it cannot be read one by one; decompress it"
            f" (`{_UNPACK[name]} < {visible(path.name)} > NEW.tar`){stream}"
        )


def _check_end(path: Path, file: io.BufferedReader, offset: int) -> None:
    """Check that the end marker follows, since ``tarfile`` stops silently at a header that it cannot read."""
    file.seek(offset)
    rest = offset
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            raise damaged(path, offset, "no member starts there and it is not the end of the archive")
        rest += len(chunk)
    if rest - offset < _END_MARKER_BYTES:
        raise damaged(path, rest, "the end of the archive is missing")
