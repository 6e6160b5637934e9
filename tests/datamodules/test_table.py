from __future__ import annotations

from lit_lora.datamodules.index import ShardIndex
from lit_lora.datamodules.table import SampleTable


def test_samples_of_all_shards(make_shards):
    paths = make_shards(2, 1, 3)
    table = SampleTable.concatenate([ShardIndex.build(path) for path in paths])

    assert len(table) == 6
    assert [table.key(sample) for sample in range(6)] == [f"{number:04}" for number in range(6)]
    assert [table.path(sample) for sample in range(6)] == [paths[0]] * 2 + [paths[1]] + [paths[2]] * 3
    captions = table.find_members(["txt"])
    for sample in range(6):
        data = table.path(sample).read_bytes()
        start, size = table.member_offset[captions[sample]], table.member_size[captions[sample]]
        assert data[start : start + size] == f"caption {sample:04}\n".encode()


def test_first_extension_wins(tmp_path, write_tar):
    names = ["a.json", "a.txt", "b.json", "c.png"]
    table = SampleTable.concatenate([ShardIndex.build(write_tar(tmp_path / "x.tar", dict.fromkeys(names, b"x")))])

    assert table.find_members(["txt", "json"]).tolist() == [1, 2, -1]
    assert table.find_members(["json", "txt"]).tolist() == [0, 2, -1]
    assert table.find_members(["webp"]).tolist() == [-1, -1, -1]
