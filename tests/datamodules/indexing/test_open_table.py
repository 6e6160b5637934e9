from __future__ import annotations

import traceback

import pytest

from lit_lora.datamodules.indexing.data_index import INDEX_NAME, DataIndex
from lit_lora.datamodules.indexing.open_table import open_table
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
    assert [request.path for request in server.requests] == [f"/{INDEX_NAME}"]


def test_copy_of_the_index_is_kept_until_refreshed(server):
    open_table(server.url)
    open_table(server.url)
    assert len(server.requests) == 1
    open_table(server.url, refresh=True)
    assert len(server.requests) == 2


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
