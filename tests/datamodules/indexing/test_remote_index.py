from __future__ import annotations

import pytest

from lit_lora.datamodules.indexing.data_index import INDEX_NAME, DataIndex
from lit_lora.datamodules.indexing.open_table import open_table, remote_index_copy
from lit_lora.datamodules.indexing.remote_index import index_remote
from lit_lora.errors import UserError
from tests.datamodules.faulty_server import FaultyServer


@pytest.fixture
def paths(make_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return make_shards(1, 2, 3)


@pytest.fixture
def server(paths):
    server = FaultyServer(paths[0].parent)
    yield server
    server.close()


@pytest.mark.parametrize("jobs", [1, 3])
def test_index_is_that_of_the_local_shards_and_training_finds_it(server, paths, jobs):
    spec = server.url + "/shard-{000000..000002}.tar"
    with pytest.raises(UserError, match="need their index beside them"):
        open_table(spec)
    assert index_remote([spec], jobs) == {server.url: remote_index_copy(server.url)}

    there, here = DataIndex.load(remote_index_copy(server.url)), DataIndex.load_or_build(paths)
    assert there.names == here.names
    assert there.shard_size.tolist() == here.shard_size.tolist()
    assert [there.shard(2).key(sample) for sample in range(3)] == ["0003", "0004", "0005"]
    (paths[0].parent / INDEX_NAME).unlink()
    assert len(open_table(spec, refresh=True)) == 6
    assert not list((remote_index_copy(server.url).parent).rglob("*.tar"))


def test_interrupted_run_continues(server, paths):
    spec = server.url + "/shard-{000000..000002}.tar"
    server.fault = lambda path: 404 if path.endswith("2.tar") else None
    with pytest.raises(UserError, match=r"(?s)1 of 3 shards cannot be used:\n  .*000002.tar.*404"):
        index_remote([spec])
    server.fault = None
    server.requests.clear()
    index_remote([spec])
    read = [request.path for request in server.requests if request.method == "GET" and "Range" not in request.headers]
    assert read == ["/shard-000002.tar"]


def test_damaged_shard_is_named_without_credentials(server, paths):
    paths[1].write_bytes(paths[1].read_bytes()[:700])
    with pytest.raises(UserError, match=r"(?s)1 of 3 shards cannot be used:\n  .*000001.tar is trunc") as caught:
        index_remote([server.url + "/shard-{000000..000002}.tar?token=secret"])
    assert "secret" not in str(caught.value)


def test_http_has_no_folders(server):
    with pytest.raises(UserError, match="cannot be listed"):
        index_remote([server.url])


def test_other_shards_of_the_folder_stay_known(server):
    for spec in ("/shard-{000000,000001}.tar", "/shard-000002.tar"):
        index_remote([server.url + spec])
    assert len(open_table(server.url)) == 6
