from __future__ import annotations

import pytest

from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.datamodules.indexing.index import ShardIndex
from lit_lora.datamodules.indexing.table import SampleTable
from lit_lora.datamodules.loading import shard_reader
from lit_lora.datamodules.loading.shard_reader import ShardReader


def test_large_members_are_not_read(make_shards, monkeypatch):
    reader = ShardReader(SampleTable.of([ShardIndex.build(path) for path in make_shards(1)]))
    size = len(reader.read(0, ("jpg",))["jpg"])
    monkeypatch.setattr(shard_reader, "MAX_MEMBER_BYTES", size - 1)
    with pytest.raises(BadSampleError, match=f"the .jpg member has {size} bytes, more than {size - 1}"):
        reader.read(0, ("jpg", "txt"))
    assert reader.read(0, ("txt",)) == {"txt": b"caption 0000\n"}
