"""Damaged indexes, tars and positions: readers raise their own errors, end soon, and need little memory.

The suite tries a few thousand mutations, always the same ones. `LIT_LORA_MUTATIONS=100000` tries as many random ones:

    LIT_LORA_MUTATIONS=100000 pytest -n 0 tests/datamodules/test_mutations.py
"""

from __future__ import annotations

import os
import re
import resource
import signal
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_lora.datamodules.batches.plan import Plan
from lit_lora.datamodules.caching.latent_cache import CacheDescription
from lit_lora.datamodules.checking.check import check_shards
from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.datamodules.decoding.image_decoder import ImageDecoder
from lit_lora.datamodules.indexing.data_index import INDEX_NAME, DataIndex
from lit_lora.datamodules.indexing.index import ShardIndex
from lit_lora.datamodules.indexing.table import SampleTable
from lit_lora.datamodules.indexing.unread_members import UnreadMembers
from lit_lora.datamodules.loading.loader import PlannedLoader
from lit_lora.datamodules.loading.shard_reader import ShardReader
from lit_lora.datamodules.streaming.shard_stream import _read_shard
from lit_lora.datamodules.streaming.stream_loader import StreamLoader
from lit_lora.errors import UserError
from tests.datamodules.one_chunk import OneChunk

BY_HAND = int(os.environ.get("LIT_LORA_MUTATIONS", "0"))
SECONDS = 10
MEMORY = 1 << 30
NUMBERS = (-1, 0, 1, 511, 513, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, -(2**63), -(2**31), 10**12)
BLOCK = 512


def mutations(part: float) -> settings:
    """A share of all mutations."""
    return settings(
        max_examples=max(1, round(part * (BY_HAND or 4000))),
        deadline=None,
        derandomize=not BY_HAND,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def bounded() -> Iterator[None]:
    """Allow little time and little memory, and no errors but those of this package."""

    def too_long(*_: Any) -> NoReturn:
        raise AssertionError(f"it takes more than {SECONDS} s of the processor")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of this process alone, so that a busy machine does not count
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    try:
        with suppress(UserError, BadSampleError), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


class Change(NamedTuple):
    """One mutation of bytes: its kind, where it is, and a number on which it depends."""

    kind: str
    place: int
    number: int


CHANGES = st.lists(
    st.builds(
        Change,
        st.sampled_from(["flip", "flip", "cut", "insert", "number", "digits", "digits", "copy", "zeros"]),
        st.integers(0, 2**20),
        st.sampled_from(NUMBERS) | st.integers(0, 255),
    ),
    min_size=1,
    max_size=3,
)


def mutate(data: bytes, changes: Sequence[Change], headers: Sequence[int] = (0,)) -> bytes:
    """The mutated bytes; two of three changes fall on the 512 bytes after one of the ``headers``."""
    for kind, place, number in changes:
        where = place // 3 if place % 3 == 0 else headers[place // 3 % len(headers)] + place // 9 % BLOCK
        where %= len(data) + 1
        end = where + 1
        new = b""
        if kind == "flip" and where < len(data):
            new = bytes([data[where] ^ (1 << number % 8)])
        elif kind == "cut":
            end = len(data)
        elif kind == "insert":
            new, end = str(number).encode() * 3, where
        elif kind == "number":
            new, end = struct.pack("<q", number), where + 8
        elif kind == "digits":
            match = re.compile(rb"[0-9]+").search(data, where)
            if match is not None:
                where, end = match.span()
                new = str(number).encode()
                if place % 2 and end - where > 1:  # as in tar headers, whose fields have fixed lengths
                    new = (b"%o" % abs(number)).rjust(end - where, b"0")[-(end - where) :]
        elif kind == "copy":
            where = where // BLOCK * BLOCK
            end = where + BLOCK
            source = abs(number) % (len(data) + 1) // BLOCK * BLOCK
            new = data[source : source + BLOCK]
        else:
            end = where + min(abs(number), BLOCK)
            new = bytes(end - where)
        data = data[:where] + new + data[end:]
    return data


class Files(NamedTuple):
    """Two shards, their indexes, and the places of the tar headers in the first shard."""

    shards: list[Path]
    tar: bytes
    own_index: bytes
    index: bytes
    headers: list[int]

    def __repr__(self) -> str:
        return "Files(...)"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, shards_in: Any) -> Files:
    shards = shards_in(tmp_path_factory.mktemp("mutations"), 3, 2)
    made = DataIndex.load_or_build(shards)
    headers = [int(offset) - BLOCK for offset in made.shard(0).member_offset]
    own = shards[0].with_name(shards[0].name + ".index").read_bytes()
    return Files(shards, shards[0].read_bytes(), own, (shards[0].parent / INDEX_NAME).read_bytes(), headers)


def use(table: SampleTable) -> None:
    """Read all that training reads: the order and sizes of samples, their members, and the images."""
    decoder = ImageDecoder()
    with suppress(UserError):
        for what, extensions in decoder.required.items():
            table.check_complete(what, extensions)
    assert table.digest >= 0
    assert table.key_digest >= 0
    table.image_sizes(np.arange(len(table.locations)))
    reader = ShardReader(table)
    for sample in range(len(table)):
        table.key(sample)
        with suppress(UserError, BadSampleError):
            members = reader.read(sample, decoder.extensions)
            decoder(members, sample, (8, 8), table.image_size(sample))


@mutations(0.2)
@given(CHANGES)
def test_index_of_a_folder(files, changes):
    file = files.shards[0].parent / "mutated.index"
    file.write_bytes(mutate(files.index, changes))
    with bounded():
        index = DataIndex.load(file)
        use(SampleTable([(str(files.shards[0].with_name(name)), index, row) for row, name in enumerate(index.names)]))


@mutations(0.15)
@given(st.lists(st.tuples(st.integers(0, 13), st.integers(0, 99), st.sampled_from(NUMBERS)), min_size=1, max_size=3))
def test_values_in_the_index_of_a_folder(files, changes):
    made = DataIndex.load_or_build(files.shards)
    columns = {name: np.array(values) for name, values in sorted(made._columns.items())}
    for column, row, number in changes:
        values = list(columns.values())[column]
        values[row % len(values)] = np.array(number, np.int64).astype(values.dtype)
    file = files.shards[0].parent / "mutated.index"
    DataIndex(made.names, columns).save(file)
    with bounded():
        index = DataIndex.load(file)
        use(SampleTable([(str(path), index, row) for row, path in enumerate(files.shards)]))


@mutations(0.15)
@given(CHANGES)
def test_index_of_a_shard(files, changes):
    file = files.shards[0].with_name("mutated.tar.index")
    file.write_bytes(mutate(files.own_index, changes))
    with bounded():
        index = ShardIndex.read(file, files.shards[0])
        if index is not None:
            use(SampleTable.of([index]))


@mutations(0.2)
@given(CHANGES)
def test_tar(files, changes):
    path = files.shards[0].with_name("mutated.tar")
    path.write_bytes(mutate(files.tar, changes, files.headers))
    with bounded():
        check_shards([path])
        with suppress(BadSampleError):
            for _ in _read_shard(str(path), frozenset(ImageDecoder().extensions), UnreadMembers()):
                pass
        use(SampleTable.of([ShardIndex.build(path)]))


@mutations(0.1)
@given(CHANGES)
def test_tar_that_is_not_the_indexed_one(files, changes):
    path = files.shards[0].with_name("replaced.tar")
    path.write_bytes(mutate(files.tar, changes, files.headers))
    with bounded():
        use(SampleTable.of([ShardIndex.build(files.shards[0]).moved_to(path)]))


@mutations(0.05)
@given(CHANGES)
def test_description_of_a_cache(changes):
    document = (
        b'{"format": "lit_lora.latent_cache", "version": 1, "latents": {"vae": "v", "resolution": 64, "buckets": null,'
        b' "center_crop": true, "flipped": false, "dtype": "float32", "latent_shapes": {}}, "text": null}'
    )
    with bounded():
        CacheDescription.parse(mutate(document, changes), "cache.json")


VALUES: Any = (
    st.sampled_from([*NUMBERS, 2**64, 10**30, None, True, 1.5, float("nan"), "3", b"x", {}])
    | st.integers(-3, 30)
    | st.lists(st.sampled_from([*NUMBERS, None, 1.5]) | st.integers(-1, 9), max_size=6)
)


@mutations(0.1)
@given(
    st.dictionaries(
        st.sampled_from(
            ["pass", "chunk_position", "repeat", "pass_batches", "visit_batches", "segments", "seed", "pads"]
        ),
        VALUES,
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["drop", "pad"]),
    st.booleans(),
)
def test_position(changes, leftovers, steps):
    def make(size: int) -> PlannedLoader:
        plan = Plan(OneChunk(23), size, leftovers=leftovers, steps_per_chunk=9 if steps else None)
        return PlannedLoader(None, plan)  # type: ignore[arg-type]

    loader = make(3)
    loader.cursor = next(islice(loader.plan.walk(loader.cursor), 2, None))[1]
    state = loader.state_dict() | changes
    for size in (3, 4):
        with bounded():
            loader = make(size)
            loader.load_state_dict(state)
            assert len(loader) >= 0
            for batch, _ in islice(loader.plan.walk(loader.cursor), 12):
                assert 0 <= batch.samples.min() <= batch.samples.max() < 23
                assert batch.slots.min() >= 0
            make(size).load_state_dict(loader.state_dict())


@mutations(0.05)
@given(st.dictionaries(st.sampled_from(["batches", "slots", "other"]), VALUES, max_size=2) | VALUES)
def test_position_in_a_stream(changes):
    loader = StreamLoader(None, 7)  # type: ignore[arg-type]
    with bounded():
        loader.load_state_dict(loader.state_dict() | changes if isinstance(changes, dict) else changes)
        assert loader.batches >= 0
        assert loader.slots >= 0
