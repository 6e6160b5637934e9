from __future__ import annotations

import os
import pickle

import numpy as np
import pytest

from lit_lora.datamodules.indexing.data_index import INDEX_NAME, DataIndex
from lit_lora.datamodules.indexing.index import ShardIndex, index_folders
from lit_lora.errors import UserError


def _facts(index: ShardIndex):
    columns = {name: value.tolist() for name, value in vars(index).items() if isinstance(value, np.ndarray)}
    return index.shard_size, index.shard_mtime_ns, columns


def test_equals_the_indexes_of_the_shards(make_shards):
    paths = make_shards(3, 1, 4)
    made = DataIndex.load_or_build(paths)

    assert made.names == tuple(path.name for path in paths)
    assert len(made) == 8
    assert made.sample_start.tolist() == [0, 3, 4, 8]
    for number, path in enumerate(paths):
        assert _facts(made.shard(number)) == _facts(ShardIndex.build(path))
    assert made.width.tolist() == [24] * 8
    assert made.extensions.tolist() == [0b10001] * 8


def test_file_is_used_until_a_shard_changes(make_shards):
    paths = make_shards(2, 2)
    file = paths[0].parent / INDEX_NAME
    DataIndex.load_or_build(paths)
    before = file.stat().st_mtime_ns
    DataIndex.load_or_build(paths[::-1])
    DataIndex.load_or_build(paths[1:])
    assert file.stat().st_mtime_ns == before

    paths[1].write_bytes(make_shards(2, 3, folder="other")[1].read_bytes())
    again = DataIndex.load_or_build(paths)
    assert file.stat().st_mtime_ns > before
    assert again.sample_start.tolist() == [0, 2, 5]


def test_other_shards_of_the_folder_stay_known(make_shards):
    paths = make_shards(1, 2, 3)
    DataIndex.load_or_build(paths[2:])
    assert DataIndex.load_or_build(paths[:1]).names == ("shard-000000.tar", "shard-000002.tar")
    paths[2].unlink()
    assert DataIndex.load_or_build(paths[:2]).names == ("shard-000000.tar", "shard-000001.tar")


def test_is_mapped_and_pickled_as_its_path(make_shards):
    made = DataIndex.load_or_build(make_shards(30, 30))
    assert len(pickle.dumps(made)) < 500
    assert _facts(pickle.loads(pickle.dumps(made)).shard(1)) == _facts(made.shard(1))
    in_memory = DataIndex.combine([made.shard(0), made.shard(1)])
    assert _facts(pickle.loads(pickle.dumps(in_memory)).shard(1)) == _facts(made.shard(1))


@pytest.mark.parametrize("jobs", [1, 2])
def test_all_damaged_shards_are_named_and_the_others_indexed(make_shards, jobs):
    paths = make_shards(2, 2, 2)
    for path in paths[:2]:
        path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match=r"(?s)2 of 3 shards cannot be used:\n  .*000000.tar is trunc.*000001.tar"):
        DataIndex.load_or_build(paths, jobs)
    assert paths[2].with_name("shard-000002.tar.index").is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_is_not_writable(make_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = make_shards(2, 2)
    paths[0].parent.chmod(0o500)
    DataIndex.load_or_build(paths)
    assert (index_folders(paths[0].parent)[1] / INDEX_NAME).is_file()


def test_index_may_lie_in_the_users_cache(make_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = make_shards(2, 2)
    DataIndex.load_or_build(paths)
    elsewhere = index_folders(paths[0].parent)[1]
    elsewhere.mkdir(parents=True)
    for file in paths[0].parent.glob("*.index"):
        file.rename(elsewhere / file.name)
    assert len(DataIndex.load_or_build(paths)) == 4
    assert not list(paths[0].parent.glob("*.index"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:40], "truncated"),
        (lambda data: data[:-300], "truncated"),
        (lambda data: b"", "not a readable index"),
        (lambda data: data.replace(b'"version":"1"', b'"version":"0"'), "another format or version"),
    ],
)
def test_damaged_file(make_shards, damage, message):
    paths = make_shards(2, 2)
    DataIndex.load_or_build(paths)
    file = paths[0].parent / INDEX_NAME
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=f"(?s)not a readable index.*{message}|{message}"):
        DataIndex.load(file)
    assert len(DataIndex.load_or_build(paths)) == 4
    assert len(DataIndex.load(file)) == 4


def test_damaged_shard_that_nobody_named_is_left_out(make_shards):
    paths = make_shards(1, 2, 3)
    DataIndex.load_or_build(paths)
    for path in paths[1:]:
        path.write_bytes(path.read_bytes()[:700] if path is paths[2] else make_shards(2, 4, folder="x")[1].read_bytes())
    assert DataIndex.load_or_build(paths[:2]).names == ("shard-000000.tar", "shard-000001.tar")
    with pytest.raises(UserError, match="1 of 3 shards cannot be used"):
        DataIndex.load_or_build(paths)


def test_stale_index_beside_the_shards_does_not_hide_a_good_one(make_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = make_shards(2, 2)
    DataIndex.load_or_build(paths)
    elsewhere = index_folders(paths[0].parent)[1] / INDEX_NAME
    elsewhere.parent.mkdir(parents=True)
    os.utime(paths[0], ns=(1, 1))
    good = DataIndex.combine([ShardIndex.build(path) for path in paths])
    good.save(elsewhere)
    before = (paths[0].parent / INDEX_NAME).stat().st_mtime_ns
    DataIndex.load_or_build(paths)
    assert (paths[0].parent / INDEX_NAME).stat().st_mtime_ns == before


def test_another_process_is_not_given_other_shards(make_shards):
    paths = make_shards(2, 2)
    sent = pickle.dumps(DataIndex.load_or_build(paths[1:]))
    DataIndex.load_or_build(paths)
    with pytest.raises(UserError, match="was changed by another program during the run; start again"):
        pickle.loads(sent)
