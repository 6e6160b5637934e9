from __future__ import annotations

import tarfile

import pytest

from lit_lora.datamodules.checking.check import check_shards
from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.datamodules.indexing.index import ShardIndex
from lit_lora.datamodules.indexing.tar_headers import is_header_of
from lit_lora.datamodules.indexing.unread_members import UnreadMembers
from lit_lora.datamodules.streaming.shard_stream import _read_shard
from lit_lora.errors import UserError


def _header(name: str, length: int, kind: bytes = tarfile.REGTYPE, **pax: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = length
    info.type = kind
    info.pax_headers = dict(pax)
    return info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


def _long_names(count: int) -> bytes:
    return (_header("././@LongLink", 512, tarfile.GNUTYPE_LONGNAME) + b"x".ljust(512, b"\0")) * count


HOSTILE = {
    "negative size in an extended header": _header("a.txt", 0, size="-1536") + bytes(1024),
    "negative size in the header": _header("a.txt", -512) + bytes(1024),
    "huge extended header": _header("x", 10**13, tarfile.XHDTYPE) + bytes(1024),
    "huge long name": _header("x", 10**13, tarfile.GNUTYPE_LONGNAME) + bytes(1024),
    "huge size in an extended header": _header("a.txt", 0, size=str(10**30)) + bytes(1024),
    "size of thousands of digits": _header("a.txt", 0, size="9" * 5000) + bytes(1024),
    "thousands of extended headers": _long_names(3000) + _header("a.txt", 0),
    "sparse member without an end": _header("a.txt", 0, **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
    + b"9999999\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_damage(tmp_path, name):
    good = _header("0.txt", 3) + b"abc".ljust(512, b"\0")
    path = tmp_path / "x.tar"
    path.write_bytes(good + HOSTILE[name] + bytes(10240))
    counts = check_shards([path]).counts
    if name == "size of thousands of digits":  # which tarfile takes for 0
        assert len(ShardIndex.build(path)) == 2
        assert "damaged shard" not in counts
        return
    with pytest.raises(UserError, match=rf"{path} is truncated or damaged at byte \d+ \(\w"):
        ShardIndex.build(path)
    assert "damaged shard" in counts
    with pytest.raises(BadSampleError):
        list(_read_shard(str(path), frozenset({"txt"}), UnreadMembers()))


@pytest.mark.parametrize(
    ("name", "size", "fits"),
    [
        (b"a/0.jpg", 1000, True),
        (b"a/0.JPG", 1000, True),
        (b"a/1.jpg", 1000, False),
        (b"a/0.jpg", 1001, False),
        (b"a/0.jp", 1000, False),
    ],
)
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_is_header_of(name, size, fits, form):
    info = tarfile.TarInfo("a/0.jpg")
    info.size = 1000
    assert is_header_of(info.tobuf(form), name, size) is fits


def test_other_blocks_are_no_headers():
    assert not is_header_of(bytes(512), b"a.jpg", 0)
    assert not is_header_of(b"", b"a.jpg", 0)
    damaged = bytearray(_header("a.jpg", 10))
    damaged[100] ^= 255
    damaged[124] ^= 255
    assert not is_header_of(bytes(damaged), b"a.jpg", 10)
    link = _header("a.jpg", 10, tarfile.SYMTYPE)
    assert not is_header_of(link, b"a.jpg", 10)
