from __future__ import annotations

import tarfile

from lit_lora.datamodules.checking import find_unread as module
from lit_lora.datamodules.checking.check import check_shards
from lit_lora.datamodules.checking.find_unread import find_unread
from lit_lora.datamodules.indexing.index import ShardIndex


def _link(path, *links):
    with tarfile.open(path, "a") as archive:
        for name, kind, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)


def _index(path, recwarn):
    index = ShardIndex.build(path)
    warned = [str(warning.message) for warning in recwarn]
    recwarn.clear()
    return index, warned


def test_links_and_keys_with_dots_are_lost_samples(tmp_path, write_tar, encode_image, recwarn):
    image = encode_image()
    members = {"0.jpg": image, "0.txt": b"0", "22.05.jpg": image, "22.05.txt": b"1", "0.seg.png": b"", "README": b""}
    path = write_tar(tmp_path / "x.tar", members)
    _link(path, ("1.jpg", tarfile.LNKTYPE, "0.jpg"), ("1.txt", tarfile.SYMTYPE, "0.txt"), ("x", tarfile.SYMTYPE, "y"))
    index, warned = _index(path, recwarn)
    assert len(index) == 1
    assert len(warned) == 1
    assert "4 members are passed over, first 22.05.jpg" in warned[0]
    assert "`lit-lora shards pack`" in warned[0]

    found = find_unread([index])
    assert [(each.kind, each.first, each.count) for each in found] == [
        ("members of samples that are passed over", "22.05.jpg", 4),
        ("members that end in .seg.png", "0.seg.png", 1),
        ("other members", "README", 2),
    ]
    summary = check_shards([path])
    assert summary.counts == {"samples passed over": 4, "members not read": 2}
    assert not summary.is_clean
    details = [problem.detail for problem in summary.examples["samples passed over"]]
    assert details[0].startswith("a key ends at the first dot")
    assert details[2].startswith("it is a link to 0.jpg")


def test_hidden_files_and_folders_are_not_mentioned(tmp_path, write_tar, encode_image, recwarn):
    image = encode_image()
    members = {
        "0.jpg": image,
        "._0.jpg": b"mac",
        "0.txt": b"0",
        "__MACOSX/._0.txt": b"mac",
        ".DS_Store": b"",
        "Thumbs.db": b"",
    }
    path = write_tar(tmp_path / "x.tar", members)
    _link(path, ("folder", tarfile.DIRTYPE, ""))
    index, warned = _index(path, recwarn)
    assert (len(index), warned, find_unread([index])) == (1, [], [])
    assert check_shards([path]).counts == {}


def test_shards_that_their_index_explains_are_not_read_again(make_shards, monkeypatch):
    indexes = [ShardIndex.build(path) for path in make_shards(3, 2)]
    monkeypatch.setattr(module, "_unread_in", None)
    assert find_unread(indexes) == []
