from __future__ import annotations

import os
import re
import traceback
from dataclasses import replace

import numpy as np
import pytest

from lit_lora.datamodules.indexing import open_table as open_table_module
from lit_lora.datamodules.indexing import sparse_copy
from lit_lora.datamodules.indexing.data_index import INDEX_NAME, DataIndex
from lit_lora.datamodules.indexing.open_table import open_table, remote_index_copy
from lit_lora.errors import UserError
from tests.datamodules.faulty_server import FaultyServer


@pytest.fixture
def server(make_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = make_shards(1, 2, 3)
    DataIndex.load_or_build(paths)
    server = FaultyServer(paths[0].parent)
    yield server
    server.close()


def _names(table):
    return [location.rpartition("/")[2] for location in table.locations]


def test_local_shards_keep_their_order(make_shards):
    one, other = make_shards(1, 2), make_shards(3, 1, folder="other")
    table = open_table([str(other[1]), str(one[0].parent), f"file://{other[0]}"])
    assert table.locations == (str(other[1]), str(one[0]), str(one[1]), str(other[0]))
    assert table.starts.tolist() == [0, 1, 2, 4, 7]
    assert all((folder / INDEX_NAME).is_file() for folder in (one[0].parent, other[0].parent))


@pytest.mark.parametrize(
    ("spec", "shards"),
    [
        ("", [0, 1, 2]),
        ("/", [0, 1, 2]),
        ("/shard-000001.tar", [1]),
        ("/shard-{000002,000000}.tar", [2, 0]),
        ("/shard-00000{1..2}.tar", [1, 2]),
        ("/*-00000[02].tar", [0, 2]),
    ],
)
def test_remote_shards_come_from_their_folders_index(server, spec, shards):
    table = open_table(server.url + spec)
    assert _names(table) == [f"shard-{number:06}.tar" for number in shards]
    assert [table.key(sample) for sample in range(len(table))] == [
        key for number in shards for key in ([["0000"], ["0001", "0002"], ["0003", "0004", "0005"]][number])
    ]
    assert {request.path for request in server.requests} == {f"/{INDEX_NAME}"}


def test_copy_of_the_index_is_kept_until_refreshed(server):
    open_table(server.url)
    number = len(server.requests)
    open_table(server.url)
    assert len(server.requests) == number
    open_table(server.url, refresh=True)
    assert len(server.requests) == 2 * number


def _refreshed(server):
    """Whether the whole index was sent when its copy was refreshed, and the keys of its samples."""
    server.requests.clear()
    table = open_table(server.url, refresh=True)
    is_sent = any("Range" not in request.headers for request in server.requests)
    return is_sent, [table.key(sample) for sample in range(len(table))]


def _last_key_changed(server):
    """Replace the server's index by that of shards whose last key is another one."""
    index = DataIndex.load(server.folder / INDEX_NAME)
    shards = [index.shard(number) for number in range(3)]
    key_bytes = np.frombuffer(b"000300040009", np.uint8)
    DataIndex.combine([*shards[:2], replace(shards[2], key_bytes=key_bytes)]).save(server.folder / INDEX_NAME)


def test_large_index_of_a_server_without_ranges_is_copied_again_only_if_it_has_changed(server, monkeypatch):
    monkeypatch.setattr(open_table_module, "_SMALL_BYTES", 1000)
    server.ranges = False
    assert _refreshed(server)[0]
    is_sent, keys = _refreshed(server)
    assert (is_sent, len(keys)) == (False, 6)
    _last_key_changed(server)
    is_sent, keys = _refreshed(server)
    assert (is_sent, keys[-1]) == (True, "0009")
    assert _refreshed(server) == (False, keys)


@pytest.mark.parametrize("change", ["no ETags", "weak ETags", "small", "other copy"])
def test_index_is_copied_again_where_it_may_have_changed(server, monkeypatch, change):
    if change != "small":
        monkeypatch.setattr(open_table_module, "_SMALL_BYTES", 1000)
    server.ranges = False
    server.etags = change != "no ETags"
    server.etag_prefix = "W/" if change == "weak ETags" else ""
    assert _refreshed(server)[0]
    if change == "other copy":  # as made by `lit-lora shards index URL`
        copy = remote_index_copy(server.url)
        copy.write_bytes(copy.read_bytes())
    assert _refreshed(server)[0]


def test_damaged_copy_of_an_unchanged_index(server, monkeypatch):
    monkeypatch.setattr(open_table_module, "_SMALL_BYTES", 1000)
    server.ranges = False
    open_table(server.url)
    copy = remote_index_copy(server.url)
    stat = copy.stat()
    with copy.open("r+b") as file:  # on the disk, without another time
        file.write(bytes(8))
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.warns(UserWarning, match="it is copied again"):
        assert len(open_table(server.url, refresh=True)) == 6
    assert not _refreshed(server)[0]


def test_index_that_is_missing_or_forbidden_later(server, monkeypatch):
    monkeypatch.setattr(open_table_module, "_SMALL_BYTES", 1000)
    open_table(server.url)
    server.fault = 404
    assert len(open_table(server.url, refresh=True)) == 6
    server.fault = 403
    with pytest.raises(UserError, match="HTTP status 403"):
        open_table(server.url, refresh=True)


def test_signature_is_sent_with_each_request_and_in_no_message(server):
    secret = "hid" + "den"  # the traceback shows this file's lines
    base, query = server.url.replace("//", f"//user:{secret}@"), f"?signature={secret}"
    table = open_table(base + "/shard-{000000..000001}.tar" + query)
    assert all(location.endswith(f".tar{query}") for location in table.locations)
    assert server.requests[0].path == f"/{INDEX_NAME}{query}"
    server.fault = 403
    with pytest.raises(UserError) as caught:
        open_table(base + "/other" + query)
    assert "HTTP status 403; check the credentials" in str(caught.value)
    assert secret not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("/shard-000007.tar", "has no shard shard-000007.tar; check the name"),
        ("/x-*.tar", r"has no shard x-\*.tar"),
        ("/none/", r"none need their index beside them: .*404"),
        ("/shard-{0..", "unbalanced braces"),
    ],
)
def test_missing_shards_and_indexes(server, spec, message):
    with pytest.raises(UserError, match=message):
        open_table(server.url + spec)


def test_index_without_an_end(server):
    server.fault = "endless"
    size = (server.folder / INDEX_NAME).stat().st_size
    with pytest.raises(UserError, match=f"it has more than {size} bytes"):
        open_table(server.url)
    assert server.sent < 50_000_000


def _with_header(data, other):
    """An index with the header of another file, whose length is put right."""
    header = other[8 : other.index(b"}}") + 2]
    return len(header).to_bytes(8, "little") + header + data[8 + int.from_bytes(data[:8], "little") :]


def test_index_that_claims_to_be_huge(server, monkeypatch):
    monkeypatch.setattr(sparse_copy, "MAX_INDEX_BYTES", 1000)
    server.fault = "endless"
    with pytest.raises(
        UserError, match=r"shards.index is not a readable index \(its header states \d+ bytes, more than 1000\)"
    ):
        open_table(server.url)
    assert server.sent < 50_000_000


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: (2**40).to_bytes(8, "little") + data[8:], "its header states 1099511627776 bytes, more than"),
        (lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1), "is not a readable index"),
        (
            lambda data: _with_header(data, re.sub(rb"\d+\]", b"9" * 14 + b"]", data)),
            "is truncated: .* ends at byte 1000000",
        ),
        (lambda data: b"<html>not found</html>", "is not a readable index"),
        (lambda data: data[:5], "is not a readable index"),
        (lambda data: data + b"x", "1 bytes follow its columns"),
    ],
)
def test_damaged_remote_index(server, damage, message):
    file = server.folder / INDEX_NAME
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=message):
        open_table(server.url)


def test_damaged_copy_of_a_remote_index_is_made_again(server):
    open_table(server.url)
    copy = remote_index_copy(server.url)
    copy.write_bytes(copy.read_bytes()[:-3])
    with pytest.warns(UserWarning, match="is truncated.*it is copied again"):
        assert len(open_table(server.url)) == 6
    assert len(open_table(server.url)) == 6
