"""Reading of samples from local and remote shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.datamodules.indexing.table import SampleTable, Span
from lit_lora.datamodules.remote.transfer import RemoteError, is_remote, read_range

MAX_MEMBER_BYTES = 256 << 20
"""No member of a sample is larger; a header can claim any size."""


class ShardReader:
    """Reads the members of samples.

    Args:
        table: Where they are in the shards.
        locate: The local file of a shard by its number; without it the shards are read where they lie, remote ones
            with a request for each sample.
    """

    def __init__(self, table: SampleTable, locate: Callable[[int], Path] | None = None) -> None:
        self.table = table
        self._locate = locate

    def location(self, sample: int) -> str:
        """The path or URL of the shard that a sample is read from."""
        shard = self.table.shard_of(sample)
        return self.table.locations[shard] if self._locate is None else str(self._locate(shard))

    def read(self, sample: int, extensions: tuple[str, ...]) -> dict[str, bytes]:
        """The members of a sample with one of these extensions, by extension.

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
    # The shard is opened anew each time: that takes microseconds, and leaves nothing open in forked workers.
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
    # Members of a sample lie side by side, so one request gets them all.
    start = min(span.offset for span in spans.values())
    end = max(span.offset + span.size for span in spans.values())
    try:
        data = read_range(location, start, end - start)
    except RemoteError as error:
        raise BadSampleError(f"cannot read the shard ({error})") from None
    return {name: data[span.offset - start :][: span.size] for name, span in spans.items()}
