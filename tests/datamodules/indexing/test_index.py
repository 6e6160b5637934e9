from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lit_lora.datamodules import ShardIndex
from lit_lora.datamodules.indexing import bounds, index
from lit_lora.errors import UserError


@pytest.fixture
def scans(monkeypatch):
    """The shards that were scanned."""
    scanned = []

    def scan(path):
        scanned.append(path)
        return scan_shard(path)

    scan_shard = index.scan_shard
    monkeypatch.setattr(index, "scan_shard", scan)
    return scanned


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".index")


def _columns(shard):
    return [getattr(shard, name).tolist() for name in bounds.DTYPES]


def test_saved_index_equals_the_built_one(make_shards, scans):
    (path,) = make_shards(3)
    built = ShardIndex.load_or_build(path)
    loaded = ShardIndex.load_or_build(path)

    assert scans == [path]
    assert _columns(built) == _columns(loaded)
    assert len(loaded) == 3
    assert [loaded.key(sample) for sample in range(3)] == ["0000", "0001", "0002"]
    assert loaded.shard_size == path.stat().st_size
    assert set(path.parent.iterdir()) == {path, _sidecar(path)}


def test_index_has_the_same_bytes_each_time(make_shards):
    (path,) = make_shards(3)
    sidecar = path.with_name(path.name + ".index")
    made = set()
    for _ in range(5):
        ShardIndex.build(path).save()
        made.add(sidecar.read_bytes())
    assert len(made) == 1


def test_changed_shard_is_scanned_again(make_shards, scans):
    (path,) = make_shards(3)
    ShardIndex.load_or_build(path)
    make_shards(4)
    os.utime(path, ns=(0, 1))

    assert len(ShardIndex.load_or_build(path)) == 4
    assert len(scans) == 2


@pytest.mark.parametrize("damage", [lambda data: data[:-8], lambda data: b"", lambda data: bytes(len(data))])
def test_unreadable_index_is_built_again(make_shards, scans, damage):
    (path,) = make_shards(3)
    built = ShardIndex.load_or_build(path)
    _sidecar(path).write_bytes(damage(_sidecar(path).read_bytes()))

    with pytest.warns(
        UserWarning, match=r"shard-000000.tar.index is not a readable index .* made again from the shards"
    ):
        assert _columns(ShardIndex.load_or_build(path)) == _columns(built)
    assert len(scans) == 2
    ShardIndex.load_or_build(path)
    assert len(scans) == 2


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("width", -5, r"width of sample 2 in shard-000000.tar is -5, not in \[0, 2147483647\]"),
        ("height", -1, "height of sample 2"),
        ("key_ends", 99, "key_ends of sample 2 in shard-000000.tar is 99, but its shard has 12 bytes of keys"),
        ("key_ends", 3, "key_ends of sample 2 in shard-000000.tar is 3, before the key begins"),
        ("key_ends", -(2**63), "key_ends of sample 2"),
        ("member_sample", 99, "member_sample of member 5 .* is 99"),
        ("member_sample", 1, "member_sample of member 5"),
        ("member_extension", 99, r"member_extension of member 5 .* is 99, not in \[0, 14\]"),
        ("member_extension", 0, "two members of one extension"),
        ("member_offset", 512 * 10**9, "member_size of member 5 .* ends at byte .* of a shard of"),
        ("member_offset", -1, r"member_offset of member 5 .* is -1, not in \[512, "),
        ("member_offset", 512, "member_offset of member 5 .* is 512, not a multiple of 512 from"),
        ("member_offset", 513 * 16, "not a multiple of 512"),
        ("member_size", -1, "member_size of member 5 .* is -1"),
        ("member_size", 2**63 - 1, "member_size of member 5"),
        ("member_size", 10**6, "ends at byte"),
    ],
)
def test_index_with_a_value_out_of_bounds_is_built_again(make_shards, scans, column, value, reason):
    (path,) = make_shards(3)
    built = ShardIndex.load_or_build(path)
    good = getattr(built, column).copy()
    getattr(built, column)[-1] = value
    built.save()

    with pytest.warns(UserWarning, match=f"is not a readable index .*{reason}"):
        assert getattr(ShardIndex.load_or_build(path), column).tolist() == good.tolist()
    assert len(scans) == 2


def test_captions_that_are_swapped_in_the_index(make_shards, scans):
    (path,) = make_shards(3)
    built = ShardIndex.load_or_build(path)
    for column in (built.member_offset, built.member_size):
        column[[1, 3]] = column[[3, 1]]
    built.save()
    with pytest.warns(
        UserWarning, match="member_offset of member 1 in shard-000000.tar is .*, not a multiple of 512 from|2 in"
    ):
        ShardIndex.load_or_build(path)
    assert len(scans) == 2


@pytest.mark.parametrize("kind", ["shard", "index"])
def test_pipe_with_the_name_of_a_file_is_not_opened(make_shards, kind):
    (path,) = make_shards(3)
    if kind == "shard":
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(UserError, match=r"shard-000000.tar is a pipe, not a regular file"):
            ShardIndex.load_or_build(path)
    else:
        os.mkfifo(_sidecar(path))
        with pytest.warns(UserWarning, match="index is a pipe, not a regular file"):
            assert len(ShardIndex.load_or_build(path)) == 3


def test_index_stays_in_memory_where_the_folder_is_not_writable(make_shards, monkeypatch):
    (path,) = make_shards(3)
    monkeypatch.setattr(os, "access", lambda *_: False)

    assert len(ShardIndex.load_or_build(path)) == 3
    assert not _sidecar(path).exists()


def test_missing_shard(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the shard .*absent.tar: No such file"):
        ShardIndex.load_or_build(tmp_path / "absent.tar")


def test_key_that_is_not_utf8(tmp_path, write_tar):
    path = write_tar(tmp_path / "x.tar", {b"\xff".decode("utf-8", "surrogateescape") + ".txt": b"x", "ü.txt": b"y"})
    shard = ShardIndex.build(path)
    assert [shard.key(0), shard.key(1)] == ["\udcff", "ü"]
    assert shard.key_bytes.dtype == np.uint8


@pytest.mark.parametrize("name", ["shard_size", "shard_mtime_ns"])
def test_metadata_beyond_64_bits(make_shards, name):
    (path,) = make_shards(3)
    replace(ShardIndex.load_or_build(path), **{name: 2**63}).save()
    assert ShardIndex.read(_sidecar(path), path) is None
