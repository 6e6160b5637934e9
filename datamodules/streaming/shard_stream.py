"""Batches from shards that are read sequentially."""

from __future__ import annotations

import tarfile
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from subprocess import Popen, TimeoutExpired
from typing import Any, NamedTuple, Self

import torch
from torch.utils.data import IterableDataset, get_worker_info

from lit_lora.datamodules.decoding.batch_builder import BatchBuilder
from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.datamodules.decoding.sample_decoder import SampleDecoder
from lit_lora.datamodules.indexing.extensions import IMAGE_EXTENSIONS
from lit_lora.datamodules.indexing.scan import EXTENSIONS, image_size
from lit_lora.datamodules.indexing.tar_headers import (
    MAX_MEMBER_BYTES,
    READ_ERRORS,
    BoundedTarInfo,
    check_size,
    describe,
)
from lit_lora.datamodules.indexing.unread_members import UnreadMembers
from lit_lora.datamodules.loading.bad_samples import BadSampleReport
from lit_lora.datamodules.loading.dataset import NO_MEMBER, Batch
from lit_lora.draws import seed_of
from lit_lora.redact import redact
from lit_lora.visible import visible

_MAX_FAILURES_IN_A_ROW = 1000
_PATIENCE_S = 1.0
_LEAST_RATE = 64  # bytes a second; a higher one would refuse servers while training itself reads slowly
_RETRY_S = 600
_SPEED_S = 60  # seconds below this rate after which curl gives up
_WHOLE_SHARD = "(the rest of the shard)"


class ShardStream(IterableDataset[Batch]):
    """Reads shards through webdataset and yields batches of B samples.

    If ``resampled``, each loader worker draws an endless sequence of shards with replacement and shuffles their samples in a
    buffer. Otherwise each shard is read once, by one worker of one process.

    A bad sample is skipped and reported in the next batch under ``"bad"``, since an exception would reach the main process
    without its type. The last item of a worker holds only ``"bad"``: the shards have ended, or too many samples were bad.

    Args:
        shards: Absolute paths, and URLs that webdataset can open.
        decoder: Conversion of a sample's members to its entries in a batch.
        size: Height and width of the images, in pixels.
        batch_size: Samples in a batch, B.
        resampled: Whether to draw shards endlessly.
        shuffle_buffer: Number of encoded samples that each worker shuffles if ``resampled``. Defaults to 0, which keeps their
            order.
        rank: Number of this process. Defaults to 0.
        world_size: Number of processes. Defaults to 1.
        max_bad_samples: Maximum number of bad samples, after which a worker stops. Defaults to 0.
        seed: Seed of the choice of shards and of the order of their samples. Defaults to 0.

    Attributes:
        start: Number of batches that this process has already yielded, and the first slot to use; set before workers start.
    """

    def __init__(
        self,
        shards: Sequence[str],
        decoder: SampleDecoder,
        size: tuple[int, int],
        batch_size: int,
        resampled: bool,
        shuffle_buffer: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_bad_samples: int = 0,
        seed: int = 0,
    ) -> None:
        self.shards = list(shards)
        self.decoder = decoder
        self.size = size
        self.batch_size = batch_size
        self.resampled = resampled
        self.shuffle_buffer = shuffle_buffer
        self.rank = rank
        self.world_size = world_size
        self.max_bad_samples = max_bad_samples
        self.seed = seed
        self.start = (0, 0)
        self._names = {shard: _shown(shard, number, len(shards)) for number, shard in enumerate(shards, 1)}

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of this worker: worker w of W yields the numbers w, w + W, w + 2 W, …."""
        info = get_worker_info()
        number, step = (0, 1) if info is None else (info.id, info.num_workers)
        failures = _Failures(self.max_bad_samples)
        samples = self._samples(number, step, failures)
        while (builder := self._take(samples, self._first_slot(number), failures)).places:
            yield self._batch(builder, number) | {"bad": failures.take()}
            number += step
        yield {"bad": failures.take()}

    def blank(self, number: int) -> Batch:
        """A batch in which all weights are 0."""
        builder = BatchBuilder(self.batch_size)
        builder.put(0, self.decoder.blank(self.size) | {"key": ""})
        return self._batch(builder, number) | {"weight": torch.zeros(self.batch_size)}

    def _samples(self, worker: int, num_workers: int, failures: _Failures) -> Iterator[_Sample]:
        import webdataset

        if not self.resampled:
            shards = self.shards[self.rank :: self.world_size][worker::num_workers]
            return self._read(({"url": shard} for shard in shards), failures)
        # The seed contains rank and worker; webdataset would take them from RANK and WORLD_SIZE in the environment.
        seed = seed_of(self.seed, "stream", self.start[0], self.rank, worker)
        drawn = webdataset.ResampledShards(self.shards, deterministic=True, seed=seed, worker_seed=lambda: 0)
        samples = self._read(drawn, failures)
        return webdataset.shuffle(self.shuffle_buffer, seed=seed)(samples) if self.shuffle_buffer else samples

    def _read(self, urls: Iterable[dict[str, str]], failures: _Failures) -> Iterator[_Sample]:
        wanted = frozenset(self.decoder.extensions)
        for item in urls:
            url, count, unread = item["url"], 0, UnreadMembers()
            try:
                for sample in _read_shard(url, wanted, unread):
                    count += 1
                    yield sample
                if unread.lost:
                    warnings.warn(f"{visible(self._names[url])}: {unread.describe_lost()}", stacklevel=2)
                if not count:
                    raise BadSampleError("it holds no samples")
            except BadSampleError as error:
                failures.add(BadSampleReport(self._names[url], _WHOLE_SHARD, str(error)))
            if failures.too_many:
                return

    def _take(self, samples: Iterator[_Sample], first_slot: int, failures: _Failures) -> BatchBuilder:
        """The next usable samples: B, fewer at the end of the shards, or none if too many are bad."""
        builder = BatchBuilder(self.batch_size)
        for sample in samples:
            place = len(builder.places)
            try:
                builder.put(place, self._decode(sample, first_slot + place))
                failures.in_a_row = 0
            except BadSampleError as error:
                failures.add(BadSampleReport(self._names[sample.url], sample.key, str(error)))
            if failures.too_many:
                return BatchBuilder(self.batch_size)
            if len(builder.places) == self.batch_size:
                break
        return builder

    def _decode(self, sample: _Sample, slot: int) -> dict[str, Any]:
        for extension, data in sample.members.items():
            if data is None:
                raise BadSampleError(f"the .{extension} member has more than {MAX_MEMBER_BYTES} bytes")
        members = {extension: data for extension, data in sample.members.items() if data is not None}
        for what, extensions in self.decoder.required.items():
            if not set(extensions) & members.keys():
                raise BadSampleError(f"there is no {what} ({' or '.join(f'.{extension}' for extension in extensions)})")
        image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
        try:
            entries = self.decoder(members, slot, self.size, (0, 0) if image is None else image_size(image))
        except StopIteration as error:  # of a `next()` that found no member
            raise BadSampleError(NO_MEMBER) from error
        return entries | {"key": sample.key}

    def _batch(self, builder: BatchBuilder, number: int) -> Batch:
        first = self._first_slot(number)
        return {
            **builder.finish(),
            **self.decoder.batch_entries(),
            "weight": torch.tensor([float(place in builder.places) for place in range(self.batch_size)]),
            "slot": list(range(first, first + self.batch_size)),
        }

    def _first_slot(self, number: int) -> int:
        return self.start[1] + (number * self.world_size + self.rank) * self.batch_size


class _Sample(NamedTuple):
    """An encoded sample; members that are too large are None."""

    url: str
    key: str
    members: Mapping[str, bytes | None]


class _Failures:
    """The bad samples of one worker."""

    def __init__(self, limit: int) -> None:
        self.in_a_row = 0
        self._limit = limit
        self._known: set[tuple[str, str]] = set()
        self._new: list[BadSampleReport] = []

    @property
    def too_many(self) -> bool:
        # The second condition ends the endless reading of damaged shards, which count only once.
        return len(self._known) > self._limit or self.in_a_row > _MAX_FAILURES_IN_A_ROW

    def add(self, report: BadSampleReport) -> None:
        self.in_a_row += 1
        if (report.shard, report.key) not in self._known:
            self._known.add((report.shard, report.key))
            self._new.append(report)

    def take(self) -> list[BadSampleReport]:
        """The bad samples since the last call."""
        new, self._new = self._new, []
        return new


class _StrictTarInfo(BoundedTarInfo):
    """A header reader that raises if ``tarfile`` would mistake damage or truncation for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not buf.strip(b"\0"):
                raise  # the end marker
            what = "a header is damaged" if buf else "the end of the archive is missing"
            raise tarfile.ReadError(what) from error


def _read_shard(url: str, wanted: frozenset[str], unread: UnreadMembers) -> Iterator[_Sample]:
    """Yield the samples of one shard; ``unread`` gets the members that are passed over.

    Members are grouped shard by shard, since across shards webdataset would merge members before and after damage into one
    sample.

    Raises:
        BadSampleError: If the shard cannot be read to its end; the samples before the damage have been yielded.
    """
    from webdataset.tariterators import group_by_keys

    try:
        for group in group_by_keys(_members(url, wanted, unread)):
            members = {name: data for name, data in group.items() if not name.startswith("__")}
            yield _Sample(url, group["__key__"], members)
    except (*READ_ERRORS, zlib.error, EOFError) as error:
        raise BadSampleError(describe(error)) from None


def _members(url: str, wanted: frozenset[str], unread: UnreadMembers) -> Iterator[dict[str, Any]]:
    from webdataset.tariterators import base_plus_ext

    with _opened(url) as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictTarInfo) as archive:
        while (info := archive.next()) is not None:
            check_size(info)
            extension = (base_plus_ext(info.name)[1] or "").lower()
            if info.isreg() and not info.issparse() and extension in wanted:
                file = archive.extractfile(info)
                assert file is not None
                data = file.read() if info.size <= MAX_MEMBER_BYTES else None
                yield {"fname": info.name, "data": data, "__url__": url}
            elif info.islnk() or info.issym() or extension not in EXTENSIONS:
                unread.add(info)
            _skip_member(archive)
            archive.members.clear()  # type: ignore[attr-defined]  # otherwise all headers would stay in memory
        rest: Any = archive.fileobj
        while chunk := rest.read(1 << 20):
            if chunk.strip(b"\0"):
                raise tarfile.ReadError("there is data after the end of the archive")


def _skip_member(archive: Any) -> None:
    """Read up to the next header; ``tarfile`` would try to skip a huge member bit by bit after the end of the stream."""
    while (rest := archive.offset - 1 - archive.fileobj.tell()) > 0:
        if not archive.fileobj.read(min(rest, 1 << 20)):
            raise tarfile.ReadError("unexpected end of data")


@contextmanager
def _opened(url: str) -> Iterator[Any]:
    """Open a shard as a stream. Errors omit webdataset's messages, which contain the URL with its credentials."""
    from webdataset.gopen import Pipe

    try:
        stream = _open(url)
    except OSError as error:
        raise BadSampleError(f"it cannot be opened ({error.strerror})") from None
    process = stream.proc if isinstance(stream, Pipe) else None
    try:
        yield stream
    except Exception as error:
        status = 0 if process is None else _end(process)
        if status:
            raise BadSampleError(f"the program that reads it ended with status {status}") from None
        if isinstance(error, OSError):
            raise BadSampleError(f"it cannot be read ({error.strerror or type(error).__name__})") from None
        raise
    except BaseException:
        if process is not None:
            process.kill()  # a stalled program would not notice that its output is closed
        raise
    finally:
        with suppress(OSError):
            stream.close()


def _open(url: str) -> Any:
    """Open a shard as webdataset does, with a least rate for ``curl``, which would wait for a silent server for ever."""
    from webdataset.gopen import Pipe, gopen, gopen_curl, gopen_schemes, rewrite_url

    url = rewrite_url(url)
    if gopen_schemes.get(url.partition(":")[0]) is not gopen_curl:
        return gopen(url)
    patient = ["--connect-timeout", "30", "--retry", "30", "--retry-delay", "2", "--retry-max-time", str(_RETRY_S)]
    limits = ["--speed-limit", str(_LEAST_RATE), "--speed-time", str(_SPEED_S)]
    command = ["curl", *patient, *limits, "-f", "-s", "-L", url]
    return Pipe(command, mode="rb", bufsize=8192, ignore_status=[141, 23])


def _end(process: Popen[bytes]) -> int:
    """Exit status of a process; 0 if it does not end by itself and is killed."""
    try:
        return process.wait(_PATIENCE_S)  # it may have closed its output and still be running
    except TimeoutExpired:
        process.kill()
        return 0


def _shown(shard: str, number: int, count: int) -> str:
    return f"pipe: (shard {number} of {count})" if shard.startswith("pipe:") else redact(shard)
