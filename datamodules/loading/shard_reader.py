"""Reading of samples from local and remote shards."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.datamodules.indexing.table import SampleTable, Span
from lit_lora.datamodules.indexing.tar_headers import BLOCK_BYTES, MAX_MEMBER_BYTES, is_header_of
from lit_lora.datamodules.remote.transfer import RemoteError, is_remote, read_range
from lit_lora.errors import UserError
from lit_lora.redact import redact


class ShardReader:
    """Reads the members of samples from local and remote shards.

    The tar header before each member is read with it and compared with the index, so that samples of a shard that was replaced
    are not taken for those that were planned.

    Args:
        table: Table with the offset and size of each member.
        locate: Function from the number of a shard to its local file. Defaults to None: shards are read in place, remote ones
            with one request per sample.
    """

    def __init__(self, table: SampleTable, locate: Callable[[int], Path] | None = None) -> None:
        self.table = table
        self._locate = locate
        self._times: dict[int, int] = {}

    def location(self, sample: int) -> str:
        """Path or URL of the shard that holds a sample."""
        shard = self.table.shard_of(sample)
        return self.table.locations[shard] if self._locate is None else str(self._locate(shard))

    def read(self, sample: int, extensions: tuple[str, ...]) -> dict[str, bytes]:
        """The members of a sample that have one of the extensions, by extension.

        Raises:
            BadSampleError: If the members cannot be read.
            UserError: If the shard holds other members than its index says.
        """
        spans = {name: span for name, span in self.table.spans(sample).items() if name in extensions}
        for name, span in spans.items():
            if span.size > MAX_MEMBER_BYTES:
                raise BadSampleError(f"the .{name} member has {span.size} bytes, more than {MAX_MEMBER_BYTES}")
        if not spans:
            return {}
        location = self.location(sample)
        found = _read_remote(location, spans) if is_remote(location) else self._read_local(location, spans, sample)
        key = self.table.key(sample).encode("utf-8", "surrogateescape")
        for name, data in found.items():
            if not is_header_of(data[:BLOCK_BYTES], key + b"." + name.encode(), spans[name].size):
                raise UserError(_replaced(redact(location), f"at byte {spans[name].offset - BLOCK_BYTES}"))
        return {name: data[BLOCK_BYTES:] for name, data in found.items()}

    def _read_local(self, location: str, spans: Mapping[str, Span], sample: int) -> dict[str, bytes]:
        # The shard is opened for each sample: this takes microseconds and leaves no open files in forked workers.
        try:
            descriptor = os.open(location, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would block
            try:
                time = os.fstat(descriptor).st_mtime_ns
                members = {
                    name: os.pread(descriptor, span.size + BLOCK_BYTES, span.offset - BLOCK_BYTES)
                    for name, span in spans.items()
                }
            finally:
                os.close(descriptor)
        except OSError as error:
            raise BadSampleError(f"cannot read the shard ({error.strerror})") from error
        if any(len(members[name]) < span.size + BLOCK_BYTES for name, span in spans.items()):
            raise BadSampleError("the shard is shorter than when it was indexed")
        if self._locate is None:  # the stager copies a shard anew at each visit
            self._warn_of_change(location, self.table.shard_of(sample), time)
        return members

    def _warn_of_change(self, location: str, shard: int, time: int) -> None:
        if self._times.setdefault(shard, time) != time:
            self._times[shard] = time
            warnings.warn(
                f"{location} was changed while it was in use; its members still have the names and sizes in the index, but"
                " may hold other images or captions",
                stacklevel=2,
            )


def _replaced(location: str, place: str) -> str:
    return (
        f"{location} is not the shard that was indexed: {place} there is another member. Restore that shard, or remove its"
        " indexes (the files that end in .index beside it) and start again, which indexes it anew"
    )


def _read_remote(location: str, spans: Mapping[str, Span]) -> dict[str, bytes]:
    # The members of a sample are adjacent, so one request reads all of them.
    start = min(span.offset for span in spans.values()) - BLOCK_BYTES
    end = max(span.offset + span.size for span in spans.values())
    try:
        data = read_range(location, start, end - start)
    except RemoteError as error:
        raise BadSampleError(f"cannot read the shard ({error})") from None
    return {name: data[span.offset - BLOCK_BYTES - start :][: span.size + BLOCK_BYTES] for name, span in spans.items()}
