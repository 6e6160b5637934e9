from __future__ import annotations

import os
import pickle
import re
import warnings
from dataclasses import replace
from errno import ENOSPC
from itertools import islice

import numpy as np
import pytest

from lit_lora.datamodules import AspectRatioBuckets, Chunks, Staging, WebDatasetDataModule
from lit_lora.datamodules.batches.buckets import Bucketing
from lit_lora.datamodules.batches.chunked_samples import ChunkedSamples
from lit_lora.datamodules.batches.plan import Plan
from lit_lora.datamodules.indexing import open_table as open_table_module
from lit_lora.datamodules.indexing import sparse_copy
from lit_lora.datamodules.indexing.data_index import INDEX_NAME, DataIndex
from lit_lora.datamodules.indexing.open_table import open_table, remote_index_copy
from lit_lora.errors import UserError
from tests.datamodules.faulty_server import FaultyServer

NUM_SHARDS = 5
OF_SHARD = 4


@pytest.fixture
def server(tmp_path, monkeypatch, write_tar, encode_image):
    """Serves shards of images of many sizes, whose index counts as a large one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(open_table_module, "_SMALL_BYTES", 1000)
    monkeypatch.setattr(sparse_copy, "_FIRST_BYTES", 100)
    paths = []
    for shard in range(NUM_SHARDS):
        members = {}
        for sample in range(OF_SHARD):
            members[f"{shard}{sample}.jpg"] = encode_image(16 + 9 * sample, 16 + 7 * shard, seed=sample)
            members[f"{shard}{sample}.txt"] = b"caption"
        paths.append(write_tar(tmp_path / "shards" / f"shard-{shard:06}.tar", members))
    DataIndex.load_or_build(paths)
    server = FaultyServer(paths[0].parent)
    yield server
    server.close()


def _opened(server):
    return open_table(server.url, refresh=True)


def _index(table):
    return table._indexes[0]


def _ranges(server):
    """First and last byte of each range that was asked for, and forget them."""
    found = [re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", "")) for request in server.requests]
    assert all(found), "a request for the whole index"
    server.requests.clear()
    return [(int(match[1]), int(match[2])) for match in found]


def _facts(table, sample):
    return table.key(sample), table.image_size(sample), table.spans(sample)


def _replaced(server, **changes):
    """Replace the server's index by one whose last shard has other columns."""
    index = DataIndex.load(server.folder / INDEX_NAME)
    shards = [index.shard(number) for number in range(NUM_SHARDS)]
    DataIndex.combine([*shards[:-1], replace(shards[-1], **changes)]).save(server.folder / INDEX_NAME)


def test_rows_are_read_when_a_shard_is_first_used(server):
    local, remote = open_table(str(server.folder)), _opened(server)
    index, offsets = _index(remote), _index(remote)._copy._offsets
    assert max(last for _, last in _ranges(server)) < offsets["rows"]
    assert (remote.digest, remote.key_digest) == (local.digest, local.key_digest)
    remote.check_complete("caption", ("txt",))
    assert not server.requests

    samples = range(OF_SHARD * 3, OF_SHARD * 4)
    assert [_facts(remote, sample) for sample in samples] == [_facts(local, sample) for sample in samples]
    rows = [offsets["rows"] + 8 * word for word in index._word_start[3:5].tolist()]
    assert _ranges(server) == [(rows[0], rows[1] - 1)]
    assert _facts(remote, 0) == _facts(local, 0)
    assert len(_ranges(server)) == 1
    assert _facts(remote, 13) == _facts(local, 13)
    assert not server.requests


def _order(spec, buckets):
    """The samples, slots and sizes of the first batches, those of two passes."""
    samples = ChunkedSamples.split(open_table(spec), Bucketing.of(32, buckets), 2, seed=7)
    plan = Plan(samples, 2, seed=7, leftovers="pad")
    walk = islice(plan.walk(plan.start()), 2 * int(plan.batches_per_pass))
    return [(batch.samples.tolist(), batch.slots.tolist(), batch.size) for batch, _ in walk]


@pytest.mark.parametrize("buckets", [None, AspectRatioBuckets(8)])
@pytest.mark.parametrize("most", [1, 9, 1000])
def test_order_is_that_of_the_whole_index(server, monkeypatch, buckets, most):
    monkeypatch.setattr(sparse_copy, "_MOST_SIZES", most)
    local, remote = _order(str(server.folder), buckets), _order(server.url, buckets)
    assert remote == local
    assert len({size for *_, size in local}) == (1 if buckets is None else 3)
    # The size of the index, three ranges up to the end of its table, and widths and heights of the shards that may be joined.
    assert len(_ranges(server)) == 4 + (0 if buckets is None else 2 * {1: 5, 9: 3, 1000: 1}[most])


def test_staged_run_over_a_sparse_copy_sees_what_a_local_one_sees(server, tmp_path):
    seen = []
    for folder, chunks in (
        (str(server.folder), Chunks(2)),
        (server.url, Chunks(2, staging=Staging(str(tmp_path / "stage")))),
    ):
        data = WebDatasetDataModule(
            folder, batch_size=2, resolution=32, chunks=chunks, buckets=AspectRatioBuckets(8), num_workers=2
        )
        data.prepare_data()
        data.setup("fit")
        loader = data.train_dataloader()
        seen.append([(batch["key"], batch["pixel_values"].tolist()) for batch in loader])
        data.teardown("fit")
    assert seen[0] == seen[1]


def test_what_was_copied_is_not_copied_again(server):
    first = _opened(server)
    first.image_sizes(np.arange(NUM_SHARDS))
    facts = _facts(first, 9)
    server.requests.clear()
    again = _opened(server)  # as in the next start
    assert _facts(again, 9) == facts
    again.image_sizes(np.arange(NUM_SHARDS))
    assert len(_ranges(server)) == 4  # the size of the index, and the table to compare


def test_processes_share_a_copy(server):
    one, other = _opened(server), open_table(server.url)
    worker = pickle.loads(pickle.dumps(other))  # as in a spawned process
    facts = _facts(one, 7)
    server.requests.clear()
    assert [_facts(table, 7) for table in (other, worker)] == [facts] * 2
    assert not server.requests
    assert _facts(worker, 0) == _facts(open_table(str(server.folder)), 0)


def test_copy_that_another_process_replaces(server):
    table = _opened(server)
    remote_index_copy(server.url).unlink()
    newer = _opened(server)
    assert _facts(table, 6) == _facts(newer, 6) == _facts(open_table(str(server.folder)), 6)


@pytest.mark.parametrize("column", ["rows", "width", "height"])
def test_part_that_was_written_by_half_is_copied_again(server, column):
    first = _opened(server)
    sizes = [side.tolist() for side in first.image_sizes(np.arange(NUM_SHARDS))]
    facts, index = _facts(first, 0), _index(first)
    with remote_index_copy(server.url).open("r+b") as file:
        file.seek(index._copy._offsets[column])
        file.write(bytes(2))
    server.requests.clear()
    again = open_table(server.url)
    assert _facts(again, 0) == facts
    assert [side.tolist() for side in again.image_sizes(np.arange(NUM_SHARDS))] == sizes
    assert len(_ranges(server)) == (1 if column == "rows" else 2)


def test_other_index_on_the_server_is_noticed_at_the_start(server):
    _facts(_opened(server), 16)
    _replaced(server, key_bytes=np.frombuffer(b"90919293", np.uint8))
    assert _opened(server).key(16) == "90"


@pytest.mark.parametrize(
    ("changes", "read", "column"),
    [
        ({"key_bytes": np.frombuffer(b"90919293", np.uint8)}, lambda table: table.key(16), "rows"),
        (
            {"width": np.full(OF_SHARD, 50, np.int32)},
            lambda table: table.image_sizes(np.arange(NUM_SHARDS)),
            "width",
        ),
    ],
    ids=["rows", "sizes"],
)
def test_index_that_changes_during_the_run(server, changes, read, column):
    table = _opened(server)
    facts = _facts(table, 0)
    offsets, words = _index(table)._copy._offsets, _index(table)._word_start
    first = {"rows": offsets["rows"] + 8 * int(words[4]), "width": offsets["width"] + 4 * OF_SHARD * 4}[column]
    _replaced(server, **changes)
    for _ in range(2):
        with pytest.raises(UserError, match=r"shards.index has changed since this run opened it, or .*start again"):
            read(table)
    assert _facts(table, 0) == facts
    assert remote_index_copy(server.url).read_bytes()[first : first + 16] == bytes(16)  # wrong values are not written
    read(_opened(server))


def test_index_that_changes_while_its_table_is_read(server):
    whole = (server.folder / INDEX_NAME).read_bytes()
    _replaced(server, key_bytes=np.frombuffer(b"90919293", np.uint8))
    other = (server.folder / INDEX_NAME).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    (server.folder / INDEX_NAME).write_bytes(whole[:header] + other[header:])
    with pytest.raises(UserError, match="its checksum is not that of its columns"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _opened(server)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-3], "is truncated: 'height' ends at byte"),
        (lambda data: data + b"x", "1 bytes follow its columns"),
        (lambda data: data[:1100], "is truncated: its header ends at byte|states too many shards"),
        (lambda data: data.replace(b'"rows"', b'"rowz"'), "does not describe a table of shards before their rows"),
        (
            lambda data: data.replace(b'"rows"', b'"rowz"').replace(b'"sample_start"', b'"rows"        '),
            "a table of shards",
        ),
        (lambda data: (2**40).to_bytes(8, "little") + data[8:], "its header states 1099511627776 bytes, more than"),
        (lambda data: b"<html>" + bytes(2000), "is not a readable index"),
    ],
)
def test_damaged_index(server, damage, message):
    file = server.folder / INDEX_NAME
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=message):
        _opened(server)


def test_index_that_claims_to_be_huge(server, monkeypatch):
    monkeypatch.setattr(sparse_copy, "MAX_INDEX_BYTES", 1500)
    with pytest.raises(UserError, match=r"its header states \d+ bytes, more than 1500"):
        _opened(server)
    monkeypatch.undo()


def test_table_of_too_many_shards(server, monkeypatch):
    monkeypatch.setattr(sparse_copy, "_MAX_TABLE_BYTES", 100)
    with pytest.raises(UserError, match="states too many shards"):
        _opened(server)


def test_storage_that_fails_later(server):
    secret = "hid" + "den"
    base = server.url.replace("//", f"//user:{secret}@")
    table = open_table(f"{base}?signature={secret}")
    server.faults.extend([503, "truncate"])
    server.requests.clear()
    assert table.key(0) == "00"  # tried again
    assert {request.path for request in server.requests} == {f"/{INDEX_NAME}?signature={secret}"}
    server.fault = 403
    with pytest.raises(UserError, match="HTTP status 403; check the credentials") as caught:
        table.key(4)
    assert secret not in str(caught.value)
    server.fault = None
    assert table.key(4) == "10"


def test_server_that_stops_sending_ranges(server):
    table = _opened(server)
    server.ranges = False
    assert _facts(table, 11) == _facts(open_table(str(server.folder)), 11)


def test_disk_without_room(server, monkeypatch):
    table = _opened(server)

    def refuse(*_):
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(
        UserError, match=r"cannot write the copy of http.*shards.index to .*: No space left on device; free some space"
    ):
        table.key(0)


def test_copy_of_another_user(server, monkeypatch):
    table = _opened(server)
    facts = _facts(table, 0)
    monkeypatch.setattr(os, "access", lambda *_: False)
    again = open_table(server.url)
    assert _facts(again, 0) == facts
    with pytest.raises(
        UserError, match=r"cannot write the copy of http.*Bad file descriptor; change the permissions there"
    ):
        again.key(8)
