from __future__ import annotations

import re
import tarfile
import zlib

import pytest
from PIL import Image

from lit_lora.datamodules.indexing.index import ShardIndex
from lit_lora.datamodules.indexing.scan import EXTENSIONS, image_size, scan_shard
from lit_lora.errors import UserError


def _header_offset(path, name):
    return path.read_bytes().index(name.encode() + b"\0")


def test_members_lie_where_the_scan_says(make_shards, encode_image):
    (path,) = make_shards(3)
    shard = scan_shard(path)
    data = path.read_bytes()

    assert shard.keys == ["0000", "0001", "0002"]
    assert shard.sizes == [(24, 16)] * 3
    read = {(s, EXTENSIONS[e]): data[offset : offset + size] for s, e, offset, size in shard.members}
    assert read[1, "jpg"] == encode_image(seed=1)
    assert read[2, "txt"] == b"caption 0002\n"
    assert len(read) == 6


def test_key_ends_at_the_first_dot_of_the_last_component(tmp_path, write_tar):
    names = ["a.b/one.txt", "a.b/two.JSON", "a.b/two.seg.txt", "a.b/.hidden.txt", "noextension"]
    shard = scan_shard(write_tar(tmp_path / "x.tar", dict.fromkeys(names, b"1")))

    assert shard.keys == ["a.b/one", "a.b/two"]
    assert [(sample, EXTENSIONS[extension]) for sample, extension, *_ in shard.members] == [(0, "txt"), (1, "json")]


def test_other_members_are_passed_over(tmp_path, write_tar, encode_image):
    members = {"a.pyd": b"cos\nsystem\n.", "a.jpg": encode_image(), "a.latent.npy": b"x", "a.txt": b"y"}
    shard = scan_shard(write_tar(tmp_path / "x.tar", members))

    assert shard.keys == ["a"]
    assert [EXTENSIONS[extension] for _, extension, *_ in shard.members] == ["jpg", "txt"]


def test_links_folders_and_sparse_files_are_passed_over(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for number, kind in enumerate((tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE, tarfile.REGTYPE)):
            info = tarfile.TarInfo(f"{number}.txt")
            info.type = kind
            archive.addfile(info)
    with pytest.warns(UserWarning, match="1 members are passed over, first 1.txt, since it is a link"):
        assert scan_shard(path).keys == ["3"]


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
def test_size_is_that_of_the_decoded_image(encode_image, format_):
    from lit_lora.datamodules.decoding.decode import decode_rgb

    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode_image(24, 16, format_, exif=exif)

    assert image_size(data) == (16, 24)
    assert image_size(data) == tuple(reversed(decode_rgb(data).shape[1:]))


def test_size_after_a_long_header(tmp_path, write_tar, encode_image):
    image = encode_image(icc_profile=b"\0" * 200_000)
    assert scan_shard(write_tar(tmp_path / "x.tar", {"a.jpg": image})).sizes == [(24, 16)]


def test_size_of_a_large_webp_that_is_turned(tmp_path, write_tar, encode_image):
    """Its EXIF data come last."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = encode_image(200, 300, "WEBP", lossless=True, exif=exif)
    assert len(image) > 2**17
    assert scan_shard(write_tar(tmp_path / "x.tar", {"a.webp": image})).sizes == [(300, 200)]


def test_size_of_the_preferred_image(tmp_path, write_tar, encode_image):
    members = {
        "a.png": encode_image(30, 20, "PNG"),
        "a.jpg": encode_image(24, 16),
        "a.webp": encode_image(9, 9, "WEBP"),
    }
    assert scan_shard(write_tar(tmp_path / "x.tar", members)).sizes == [(24, 16)]


def test_size_of_damaged_image_is_unknown(tmp_path, write_tar):
    assert scan_shard(write_tar(tmp_path / "x.tar", {"a.jpg": b"\xff\xd8 nothing"})).sizes == [(0, 0)]


def test_cut_within_a_member(make_shards):
    (path,) = make_shards(3)
    cut = _header_offset(path, "0002.jpg") + 600
    path.write_bytes(path.read_bytes()[:cut])

    with pytest.raises(UserError, match=rf"{re.escape(str(path))} is truncated or damaged at byte {cut} "):
        scan_shard(path)


def test_cut_within_a_header(make_shards):
    (path,) = make_shards(3)
    start = _header_offset(path, "0002.jpg")
    path.write_bytes(path.read_bytes()[: start + 100])

    with pytest.raises(UserError, match=f"damaged at byte {start} "):
        scan_shard(path)


@pytest.mark.parametrize("zeros", [0, 512])
def test_cut_at_a_member_boundary(make_shards, zeros):
    (path,) = make_shards(3)
    cut = _header_offset(path, "0002.jpg")
    path.write_bytes(path.read_bytes()[:cut] + bytes(zeros))

    with pytest.raises(UserError, match=f"damaged at byte {cut + zeros} .*end of the archive is missing"):
        scan_shard(path)


def test_zero_blocks_within_the_archive(make_shards):
    (path,) = make_shards(3)
    start = _header_offset(path, "0001.jpg")
    data = bytearray(path.read_bytes())
    data[start : start + 1024] = bytes(1024)
    path.write_bytes(data)

    with pytest.raises(UserError, match=f"damaged at byte {start} .*not the end of the archive"):
        scan_shard(path)


def test_damaged_header_within_the_archive(make_shards):
    (path,) = make_shards(3)
    start = _header_offset(path, "0001.txt")
    data = bytearray(path.read_bytes())
    data[start + 2] ^= 0xFF
    path.write_bytes(data)

    with pytest.raises(UserError, match=f"damaged at byte {start} "):
        scan_shard(path)


@pytest.mark.parametrize("content", [b"", b"not a tar" * 100])
def test_not_a_tar(tmp_path, content):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged at byte 0"):
        scan_shard(path)


@pytest.mark.parametrize("members", [{}, {"README.md": b"hello"}])
def test_without_samples(tmp_path, write_tar, members):
    with pytest.raises(UserError, match="holds no samples"):
        scan_shard(write_tar(tmp_path / "x.tar", members))


def test_repeated_key(tmp_path, write_tar):
    members = dict.fromkeys(["first.txt", "second.txt", "first.json"], b"x")
    with pytest.raises(UserError, match="key 'first' twice"):
        scan_shard(write_tar(tmp_path / "x.tar", members))


def test_repeated_member(tmp_path, write_tar):
    with pytest.raises(UserError, match="key 'a' twice"):
        scan_shard(write_tar(tmp_path / "x.tar", dict.fromkeys(["a.txt", "a.TXT"], b"x")))


@pytest.mark.parametrize(("width", "height"), [(2**32 - 1, 4), (4, 2**31)])
def test_sizes_that_the_index_cannot_hold_are_unknown(tmp_path, write_tar, encode_image, width, height):
    data = bytearray(encode_image(format="PNG"))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path = write_tar(tmp_path / "x.tar", {"a.png": bytes(data), "b.png": encode_image(format="PNG")})
    index = ShardIndex.build(path)
    assert index.width.tolist() == [0, 24]
    assert index.height.tolist() == [0, 16]


@pytest.mark.parametrize(
    "metadata", ['{"width": "9999999999", "height": "1"}', '{"width": "-3", "height": "1"}', "[" * 9000]
)
def test_cached_samples_of_impossible_sizes(tmp_path, write_tar, metadata):
    header = f'{{"__metadata__": {metadata}}}'.encode()
    path = write_tar(tmp_path / "x.tar", {"a.safetensors": len(header).to_bytes(8, "little") + header})
    assert ShardIndex.build(path).width.tolist() == [0]
