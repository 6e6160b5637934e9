from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from lit_lora.datamodules import ShardIndex
from lit_lora.datamodules.indexing import index
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
    return [getattr(shard, name).tolist() for name in index._COLUMNS]


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

    assert _columns(ShardIndex.load_or_build(path)) == _columns(built)
    assert len(scans) == 2
    ShardIndex.load_or_build(path)
    assert len(scans) == 2


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("member_offset", 10**9),
        ("member_offset", -1),
        ("member_sample", 99),
        ("key_ends", 99),
        ("member_extension", 99),
    ],
)
def test_inconsistent_index_is_built_again(make_shards, scans, column, value):
    (path,) = make_shards(3)
    built = ShardIndex.load_or_build(path)
    good = getattr(built, column).copy()
    getattr(built, column)[-1] = value
    built.save()

    assert getattr(ShardIndex.load_or_build(path), column).tolist() == good.tolist()
    assert len(scans) == 2


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
