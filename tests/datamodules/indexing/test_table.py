from __future__ import annotations

import numpy as np
import pytest

from lit_lora.datamodules.batches.buckets import AspectRatioBuckets, Bucketing
from lit_lora.datamodules.batches.repeats import Repeats
from lit_lora.datamodules.indexing.data_index import DataIndex
from lit_lora.datamodules.indexing.index import ShardIndex
from lit_lora.datamodules.indexing.table import SampleTable
from lit_lora.errors import UserError


def _table(paths):
    return SampleTable.of([ShardIndex.build(path) for path in paths])


def test_samples_of_all_shards(make_shards):
    paths = make_shards(2, 1, 3)
    table = _table(paths)

    assert len(table) == 6
    assert [table.key(sample) for sample in range(6)] == [f"{number:04}" for number in range(6)]
    assert [table.shard_of(sample) for sample in range(6)] == [0, 0, 1, 2, 2, 2]
    assert table.locations == tuple(str(path) for path in paths)
    assert table.shard_size.tolist() == [path.stat().st_size for path in paths]
    for sample in range(6):
        data = paths[table.shard_of(sample)].read_bytes()
        spans = table.spans(sample)
        assert list(spans) == ["jpg", "txt"]
        start, size = spans["txt"]
        assert data[start : start + size] == f"caption {sample:04}\n".encode()
        assert table.image_size(sample) == (24, 16)


def test_some_shards_in_another_order(make_shards):
    paths = make_shards(2, 1, 3)
    table = _table([paths[2], paths[0]])
    shards = np.array([1, 0])

    assert [table.key(sample) for sample in range(5)] == ["0003", "0004", "0005", "0000", "0001"]
    assert table.samples(shards).tolist() == [3, 4, 0, 1, 2]
    assert [column.tolist() for column in table.image_sizes(shards)] == [[24] * 5, [16] * 5]
    assert table.nth(shards, np.arange(5)).tolist() == [3, 4, 0, 1, 2]
    assert [column.tolist() for column in table.sizes_of(np.array([0, 4]))] == [[24] * 2, [16] * 2]


def test_digest_of_the_keys(make_shards):
    paths = make_shards(2, 1, 3)
    index = DataIndex.load_or_build(paths)
    orders = [[0, 1, 2], [0, 2], [2, 1], [1, 2, 0]]
    tables = [SampleTable([(index.names[row], index, row) for row in order]) for order in orders]
    assert len({table.key_digest for table in tables}) == 4
    assert [_table([paths[row] for row in order]).key_digest for order in orders] == [one.key_digest for one in tables]
    assert _table(make_shards(2, 1, 3, folder="moved")).key_digest == tables[0].key_digest


def test_digest_names_the_shards(make_shards, tmp_path):
    one, other = make_shards(2, 3), make_shards(2, 3, folder="moved")
    assert _table(one).digest == _table(other).digest
    assert len({_table(paths).digest for paths in (one, one[:1], one[::-1], make_shards(3, 2, folder="x"))}) == 4


def test_samples_that_lack_something(make_shards, tmp_path, write_tar, encode_image):
    image = encode_image()
    bad = write_tar(tmp_path / "bad.tar", {"x.jpg": image, "y.jpg": image, "y.txt": b"y", "z.jpg": image})
    table = _table([*make_shards(2), bad])

    table.check_complete("image", ("jpg", "png"))
    with pytest.raises(
        UserError, match=r"2 of 5 samples have no caption \(.txt or .json\); in .*bad.tar 2 of 3, first x, z"
    ):
        table.check_complete("caption", ("txt", "json"))
    with pytest.raises(UserError, match=r"5 of 5 samples have no caption \(.json\)"):
        table.check_complete("caption", ("json",))


def test_digests_are_those_that_checkpoints_and_caches_of_earlier_versions_hold(write_tar, tmp_path):
    """With others, nobody could resume from a checkpoint, and all caches would be made again."""
    members = {"a.jpg": b"no image", "a.txt": b"caption", "b.jpg": b"none", "b.txt": b""}
    table = _table([write_tar(tmp_path / "shard-0.tar", members)])
    assert table.digest == 7563437879351457871
    assert table.key_digest == 26588490
    assert table.shard_digest(0) == "blake2b:8f11e720b9700f49523c7c4a8a4ee97a"
    repeats = Repeats(np.array([2.5]), np.array([0]))
    assert repeats.digest == 4961310266008125253
    assert Bucketing.of(512, None).digest == 5261350623426643340
    assert Bucketing.of(512, AspectRatioBuckets()).digest == 7378723322244163757
