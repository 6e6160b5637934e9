"""Reading of samples from local and remote shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.datamodules.indexing.table import SampleTable, Span
from lit_lora.datamodules.remote.transfer import RemoteError, is_remote, read_range

MAX_MEMBER_BYTES = 256 << 20
"""Maximum size of a sample's member; larger ones are bad, since a damaged header can state any size."""


class ShardReader:
    """Reads the members of samples from local and remote shards.

    Args:
        table: Table with the offset and size of each member.
        locate: Function from the number of a shard to its local file. Defaults to None: shards are read in place, remote ones
            with one request per sample.
    """

    def __init__(self, table: SampleTable, locate: Callable[[int], Path] | None = None) -> None:
        self.table = table
        self._locate = locate

    def location(self, sample: int) -> str:
        """Path or URL of the shard that holds a sample."""
        shard = self.table.shard_of(sample)
        return self.table.locations[shard] if self._locate is None else str(self._locate(shard))

    def read(self, sample: int, extensions: tuple[str, ...]) -> dict[str, bytes]:
        """The members of a sample that have one of the extensions, by extension.

        Raises:
            BadSampleError: If the members cannot be read.
        """
        spans = {name: span for name, span in self.table.spans(sample).items() if name in extensions}
        for name, span in spans.items():
            if span.size > MAX_MEMBER_BYTES:
                raise BadSampleError(f"the .{name} member has {span.size} bytes, more than {MAX_MEMBER_BYTES}")
        if not spans:
            return {}
        location = self.location(sample)
        return _read_remote(location, spans) if is_remote(location) else _read_local(location, spans)


def _read_local(location: str, spans: Mapping[str, Span]) -> dict[str, bytes]:
    # The shard is opened for each sample: this takes microseconds and leaves no open files in forked workers.
    try:
        descriptor = os.open(location, os.O_RDONLY)
        try:
            members = {name: os.pread(descriptor, span.size, span.offset) for name, span in spans.items()}
        finally:
            os.close(descriptor)
    except OSError as error:
        raise BadSampleError(f"cannot read the shard ({error.strerror})") from error
    if any(len(members[name]) < span.size for name, span in spans.items()):
        raise BadSampleError("the shard is shorter than when it was indexed")
    return members


def _read_remote(location: str, spans: Mapping[str, Span]) -> dict[str, bytes]:
    # The members of a sample are adjacent, so one request reads all of them.
    start = min(span.offset for span in spans.values())
    end = max(span.offset + span.size for span in spans.values())
    try:
        data = read_range(location, start, end - start)
    except RemoteError as error:
        raise BadSampleError(f"cannot read the shard ({error})") from None
    return {name: data[span.offset - start :][: span.size] for name, span in spans.items()}
