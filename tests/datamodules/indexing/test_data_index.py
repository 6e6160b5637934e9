from __future__ import annotations

import os
import pickle

import numpy as np
import pytest

from lit_lora.datamodules.indexing import data_index
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
    assert [column.tolist() for column in made.image_sizes(1, 3)] == [[24] * 5, [16] * 5]
    assert made.lacking(0b1).tolist() == made.lacking(0b10010).tolist() == [0, 0, 0]
    assert made.lacking(0b10).tolist() == [3, 1, 4]


def test_file_is_used_until_a_shard_changes(make_shards):
    paths = make_shards(2, 2)
    file = paths[0].parent / INDEX_NAME
    DataIndex.load_or_build(paths)
    os.utime(file, ns=(1, 1))  # times may be as coarse as ten milliseconds
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
        (lambda data: data.replace(b'"version":"2"', b'"version":"1"'), "another format or version"),
        (
            lambda data: data.replace(b"shard-000000.tar", b"shard-000007.tar"),
            "its checksum is not that of its columns",
        ),
    ],
)
def test_damaged_file(make_shards, damage, message):
    paths = make_shards(2, 2)
    DataIndex.load_or_build(paths)
    file = paths[0].parent / INDEX_NAME
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=f"(?s)not a readable index.*{message}|{message}"):
        DataIndex.load(file)
    with pytest.warns(UserWarning, match=r"(?s)shards.index is not a readable index .* made again from the shards"):
        assert len(DataIndex.load_or_build(paths)) == 4
    assert len(DataIndex.load(file)) == 4


def _changed(made, column, shard, row, value):
    """An index with another value: in a row of a shard, or in the column of all shards if ``shard`` is None."""
    changed = DataIndex(made.names, {name: np.array(values) for name, values in made._columns.items()})
    values = changed._columns[column] if shard is None else changed._rows(shard)[column]
    values[row] = value
    return changed


@pytest.mark.parametrize(
    ("column", "shard", "row", "value", "reason"),
    [
        ("width", 1, 1, -5, r"width of sample 1 in shard-000001.tar is -5, not in \[0, 2147483647\]"),
        ("width", 1, 1, 23, "rows_crc32 of shard-000001.tar is not that of its values"),
        (
            "height",
            None,
            2,
            9,
            "the image sizes of shard-000001.tar for the plan of buckets are not those of its samples",
        ),
        ("key_ends", 1, 0, -4, "key_ends of sample 0 in shard-000001.tar is -4"),
        ("key_ends", 1, 1, 2, "key_ends of sample 1 in shard-000001.tar is 2, before the key begins"),
        ("key_ends", 1, 1, 7, "key_ends of sample 1 in shard-000001.tar is 7, but its shard has 8 bytes of keys"),
        ("key_bytes", 0, 3, 57, "keys_crc32 of shard-000000.tar is not that of its values"),
        ("member_sample", 1, 0, 1, "member_sample of member 0 in shard-000001.tar is 1"),
        ("member_sample", 0, 3, 0, "member_sample of member 3 in shard-000000.tar is 0"),
        ("member_offset", 1, 0, 0, "member_offset of member 0 in shard-000001.tar is 0"),
        ("member_size", 1, 3, 10**9, "ends at byte .* of a shard of"),
        ("member_size", 1, 3, 1, "rows_crc32 of shard-000001.tar is not that of its values"),
        ("member_extension", 1, 3, 0, "member_extension of member 2 in .* is that of a sample with two members of one"),
        ("patterns", None, 0, 3, "patterns of shard-000000.tar are not those of its members"),
        ("pattern_counts", None, 1, 3, "pattern_counts of shard-000001.tar are not those of its members"),
        ("shard_size", None, 1, -1, "shard_size of shard-000001.tar is -1"),
        ("sample_start", None, 1, 4, "its columns do not match: sample_start"),
        ("sample_start", None, 2, 5, "its columns do not match: rows does not have"),
        ("key_start", None, 1, -1, "its columns do not match: key_start"),
        ("key_start", None, 2, 2**41, "its columns do not match: key_start"),
    ],
)
def test_value_out_of_bounds(make_shards, column, shard, row, value, reason):
    paths = make_shards(2, 2)
    file = paths[0].parent / INDEX_NAME
    _changed(DataIndex.load_or_build(paths), column, shard, row, value).save(file)
    with pytest.raises(UserError, match=f"shards.index is not a readable index .*{reason}"):
        DataIndex.load(file)
    with pytest.warns(UserWarning, match=f"{reason}.* made again from the shards"):
        assert _facts(DataIndex.load_or_build(paths).shard(1)) == _facts(ShardIndex.build(paths[1]))


@pytest.mark.parametrize("bound", ["_CHECKED_AT_ONCE", "_SHARDS_CHECKED_AT_ONCE"])
def test_shards_of_huge_indexes_are_checked_when_they_are_used(make_shards, monkeypatch, bound):
    paths = make_shards(2, 3)
    made = DataIndex.load_or_build(paths)
    _changed(made, "member_size", 1, 2, -1).save(paths[0].parent / INDEX_NAME)
    monkeypatch.setattr(data_index, bound, {"_CHECKED_AT_ONCE": 9, "_SHARDS_CHECKED_AT_ONCE": 1}[bound])

    index = pickle.loads(pickle.dumps(DataIndex.load_or_build(paths)))
    assert _facts(index.shard(0)) == _facts(made.shard(0))
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"member_size of member 2 in shard-000001.tar is -1.*lit-lora shards index"
        ):
            index.shard(1)


@pytest.mark.parametrize("names", [["../a.tar", "b.tar"], ["a.tar", "a.tar"], ["a.tar", 3], ["", "b.tar"], "ab"])
def test_names_that_are_no_files_of_the_folder(make_shards, names):
    paths = make_shards(2, 2)
    made = DataIndex.load_or_build(paths)
    file = paths[0].parent / INDEX_NAME
    made.names = names
    made.save(file)
    with pytest.raises(UserError, match=r"is not the name of a shard|names a shard twice|names no shards"):
        DataIndex.load(file)


def test_pipe_with_the_name_of_the_index_is_not_opened(make_shards):
    paths = make_shards(2)
    os.mkfifo(paths[0].parent / INDEX_NAME)
    with pytest.warns(UserWarning, match="shards.index is a pipe, not a regular file"):
        assert len(DataIndex.load_or_build(paths)) == 2


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
