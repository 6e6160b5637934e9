"""Tars that are made to do harm: one error each, at once, whatever their headers say."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile

import numpy as np
import pytest

from lit_lora.datamodules.checking.check import check_shards
from lit_lora.datamodules.indexing.scan import scan_shard
from lit_lora.datamodules.indexing.tar_headers import walk_headers
from lit_lora.datamodules.packing.pack import pack_folder
from lit_lora.errors import UserError


def _pax_size(size):
    def write(archive):
        info = tarfile.TarInfo("a.txt")
        info.size = 3
        info.pax_headers = {"size": size}
        archive.addfile(info, io.BytesIO(b"abc"))

    return write


def _extended(kind, count, size=None):
    """Extended headers in a row, the first of which states another size."""

    def write(archive):
        for number in range(count):
            info = tarfile.TarInfo("././@LongLink")
            info.type, info.size = kind, 2
            header = info.tobuf(tarfile.GNU_FORMAT)
            if size is not None and not number:
                info.size = size
                header = info.tobuf(tarfile.GNU_FORMAT)
            archive.fileobj.write(header + b"x\0".ljust(512, b"\0"))
            archive.offset += 1024

    return write


def _raw(archive):
    """A member of an unknown type that ends far behind the archive."""
    info = tarfile.TarInfo("a.txt")
    info.type, info.size = b"Z", 1 << 60
    archive.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
    archive.offset += 512


HOSTILE = {
    "negative PAX size": _pax_size("-1024"),
    "a PAX size that leads back to its own header": _pax_size("-1536"),
    "huge PAX size": _pax_size(str(10**30)),
    "PAX size above the file": _pax_size("100000"),
    "3000 long names in a row": _extended(tarfile.GNUTYPE_LONGNAME, 3000),
    "3000 PAX headers in a row": _extended(tarfile.XHDTYPE, 3000),
    "a long name of 2 EB": _extended(tarfile.GNUTYPE_LONGNAME, 1, 1 << 61),
    "a long name of negative size": _extended(tarfile.GNUTYPE_LONGNAME, 1, -512),
    "PAX records of 100 MB": _extended(tarfile.XHDTYPE, 1, 100_000_000),
    "an unknown type of 1 EB": _raw,
}


@pytest.fixture(params=HOSTILE)
def hostile(request, tmp_path, encode_image):
    path = tmp_path / "data" / "x.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in (("0.jpg", encode_image()), ("0.txt", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        HOSTILE[request.param](archive)
    return path


def test_hostile_headers_are_damage(hostile, tmp_path):
    with pytest.raises(UserError, match=r"x.tar is truncated or damaged at byte \d+ \("):
        scan_shard(hostile)
    with pytest.raises(UserError), hostile.open("rb") as file:
        for info in walk_headers(hostile, file):
            assert info.offset_data + info.size <= hostile.stat().st_size
    summary = check_shards([hostile], decode=False)
    assert summary.counts["damaged shard"] == 1
    with pytest.raises(UserError, match=r"1 bad file.*\n  x.tar: is truncated or damaged at byte \d+"):
        pack_folder(hostile.parent, tmp_path / "out")


@pytest.mark.parametrize(
    ("size", "reason"),
    [(1 << 61, r"an extended header of \d+ bytes"), (100_000_000, r"an extended header of 100000000 bytes")],
)
def test_long_extended_headers_are_not_read_into_memory(tmp_path, size, reason):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        _extended(tarfile.XHDTYPE, 1, size)(archive)
    with pytest.raises(UserError, match=reason):
        scan_shard(path)


@pytest.mark.parametrize("seed", range(4))
def test_changed_bytes_never_raise_anything_else(tmp_path, encode_image, seed):
    """Either all headers are read, within the file, or there is one error."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in (("ä" * 90 + ".txt", b"x"), ("0.jpg", encode_image()), ("0.txt", b"x")):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(data), {"comment": "c"}
            archive.addfile(info, io.BytesIO(data))
    whole = path.read_bytes()
    rng = np.random.default_rng(seed)
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, min(len(data), 6144), rng.integers(1, 4)):
            data[place] = rng.integers(256)
        for start in range(0, 6144, 512):  # with right checksums, so that the change is believed
            block = bytearray(data[start : start + 512])
            if block[257:262] == b"ustar":
                block[148:156] = b" " * 8
                data[start + 148 : start + 156] = f"{sum(block):06o}\0 ".encode()
        path.write_bytes(data)
        try:
            with path.open("rb") as file:
                infos = list(walk_headers(path, file))
        except UserError:
            continue
        assert all(info.size >= 0 and info.offset_data + info.size <= len(data) for info in infos if info.isreg())


@pytest.mark.parametrize(
    ("compress", "name", "advice"),
    [
        (gzip.compress, "gzip", r"`gunzip < x.tar > NEW.tar`\), or stream it with WebDatasetStreamDataModule"),
        (bz2.compress, "bzip2", "bunzip2"),
        (lzma.compress, "xz", "unxz"),
        (lambda data: b"\x28\xb5\x2f\xfd" + data, "zstd", r"unzstd < x.tar > NEW.tar`\)$"),
    ],
)
def test_compressed_shards_are_named_so(tmp_path, make_shards, compress, name, advice):
    (shard,) = make_shards(2)
    path = tmp_path / "x.tar"
    path.write_bytes(compress(shard.read_bytes()))
    with pytest.raises(UserError, match=rf"x.tar is compressed \({name}\).*{advice}"):
        scan_shard(path)
    assert check_shards([path]).examples["damaged shard"][0].detail.startswith(f"compressed ({name})")
    with pytest.raises(UserError, match=rf"x.tar: is compressed \({name}\)"):
        pack_folder(path, tmp_path / "out")
