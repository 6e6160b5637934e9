"""Shards whose samples an index would pass over, packed anew."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from lit_lora.datamodules.packing.pack import pack_folder
from lit_lora.errors import UserError


@pytest.fixture
def pack(tmp_path, write_tar):
    """Packs a shard of these members and links: the new members, and the reasons for what is left out."""

    def pack(members, *links, max_bad=0):
        path = write_tar(tmp_path / "data" / "x.tar", members)
        with tarfile.open(path, "a") as archive:
            for name, kind, target in links:
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, target
                archive.addfile(info)
        out = tmp_path / "out"
        summary = pack_folder(path, out, max_bad=max_bad)
        contents = {}
        for shard in sorted(out.glob("*.tar")):
            with tarfile.open(shard) as archive:
                contents |= {member.name: archive.extractfile(member).read() for member in archive}
        left_out = [json.loads(line) for line in (out / "bad.jsonl").read_text().splitlines()]
        assert sum(line.get("count", 1) for line in left_out) == sum(f.count for f in [*summary.bad, *summary.skipped])
        return contents, {line["file"]: line["reason"] for line in left_out}

    return pack


def test_links_are_read_as_the_members_to_which_they_lead(pack, encode_image):
    image, other = encode_image(), encode_image(seed=1)
    contents, left_out = pack(
        {"./0.jpg": image, "./0.txt": b"0", "d/1.jpg": other, "d/1.txt": b"1", "2.txt": b"2"},
        ("2.jpg", tarfile.LNKTYPE, "./0.jpg"),
        ("3.jpg", tarfile.LNKTYPE, "d/1.jpg"),
        ("3.txt", tarfile.SYMTYPE, "d/1.txt"),
        ("d/4.jpg", tarfile.SYMTYPE, "../3.jpg"),  # a link to a link, relative to its folder
        ("d/4.txt", tarfile.SYMTYPE, "1.txt"),
    )
    assert left_out == {}
    assert {name: data for name, data in contents.items() if name[-3:] == "txt"} == {
        "0.txt": b"0", "d/1.txt": b"1", "2.txt": b"2", "3.txt": b"1", "d/4.txt": b"1",
    }  # fmt: skip
    assert (contents["2.jpg"], contents["3.jpg"], contents["d/4.jpg"]) == (image, other, other)


def test_links_out_of_the_shard_and_in_circles_are_bad(pack, encode_image):
    members = {"0.jpg": encode_image(), "0.txt": b"0", "1.txt": b"1", "2.txt": b"2"}
    links = [
        ("1.jpg", tarfile.SYMTYPE, "/etc/1.jpg"),
        ("2.jpg", tarfile.SYMTYPE, "3.jpg"),
        ("3.jpg", tarfile.SYMTYPE, "2.jpg"),
    ]
    contents, left_out = pack(members, *links, max_bad=5)
    assert list(contents) == ["0.jpg", "0.txt"]
    assert left_out["x.tar: 1.jpg"] == "is a link to /etc/1.jpg, which the shard does not hold; pack it with its target"
    assert left_out["x.tar: 1"] == "has no image"
    assert {"x.tar: 2.jpg", "x.tar: 3.jpg", "x.tar: 2"} < set(left_out)


def test_keys_with_dots(pack, encode_image):
    image, other = encode_image(), encode_image(seed=1)
    members = {"22.05.jpg": image, "22.05.txt": b"5", "22_05.jpg": other, "22_05.txt": b"_", "v1.2/a.b.JPG": image}
    contents, left_out = pack({**members, "v1.2/a.b.json": b'{"caption": "x"}', "0.jpg": image, "0.txt": b"0"})
    assert left_out == {}
    assert contents == {
        "22_05.jpg": image, "22_05.txt": b"5", "22_05-2.jpg": other, "22_05-2.txt": b"_", "v1_2/a_b.jpg": image,
        "v1_2/a_b.json": b'{"caption": "x"}', "0.jpg": image, "0.txt": b"0",
    }  # fmt: skip
    assert next(iter(contents)) == "22_05.jpg"


def test_parts_of_packed_samples_are_counted_and_other_samples_are_bad(pack, encode_image):
    image = encode_image()
    members = {"0.jpg": image, "0.txt": b"0", "0.seg.png": image, "1.jpg": image, "1.txt": b"1", "1.seg.png": image}
    more = {"0.npy": b"", "README": b"", "7.input.jpg": image, "7.output.txt": b"7"}
    contents, left_out = pack(members | more, max_bad=2)
    dotted, rename = "its key contains a dot, and it lacks", "of the same name; rename the members to KEY.EXTENSION"
    assert list(contents) == ["0.jpg", "0.txt", "1.jpg", "1.txt"]
    assert left_out == {
        "x.tar: 0.seg.png": "members that end in .seg.png are not packed",
        "x.tar: 0.npy": "members that end in .npy are not packed",
        "x.tar: README": "is no image or caption",
        "x.tar: 7.input.jpg": f"{dotted} a caption {rename}",
        "x.tar: 7.output.txt": f"{dotted} an image {rename}",
    }


def test_other_image_formats_in_shards(pack, encode_image):
    members = {"0.bmp": encode_image(format="BMP"), "0.txt": b"0", "1.jfif": encode_image(), "1.cls": b"1"}
    both = {"2.jpg": encode_image(), "2.tif": encode_image(format="TIFF"), "2.txt": b"2"}
    contents, left_out = pack(members | both)
    assert list(contents) == ["0.png", "0.txt", "1.jpg", "1.cls", "2.jpg", "2.txt"]
    assert left_out == {"x.tar: 2.tif": "members that end in .tif are not packed"}


def test_hidden_files_are_no_samples(pack, encode_image):
    members = {
        "a.jpg": encode_image(),
        "a.txt": b"a",
        "._a.jpg": b"mac",
        "__MACOSX/._a.txt": b"mac",
        "d/.DS_Store": b"",
    }
    contents, left_out = pack(members)
    assert (list(contents), left_out) == (["a.jpg", "a.txt"], {})


def test_shards_without_samples(tmp_path, write_tar, encode_image):
    write_tar(tmp_path / "data" / "a.tar", {"README": b"", "x.mp4": b""})
    with pytest.raises(UserError, match=r"none of 2 files can be packed, first a.tar: README: is no image or caption"):
        pack_folder(tmp_path / "data", tmp_path / "out")
    write_tar(tmp_path / "empty" / "a.tar", {})
    with pytest.raises(UserError, match="none of 0 files can be packed"):
        pack_folder(tmp_path / "empty", tmp_path / "out")
    write_tar(tmp_path / "openclip" / "a.tar", {"0.input.jpg": encode_image(), "0.output.txt": b"0"})
    with pytest.raises(UserError, match=r"2 bad files.*\n  a.tar: 0.input.jpg: its key contains a dot"):
        pack_folder(tmp_path / "openclip", tmp_path / "out")


def test_names_in_tars_cannot_control_the_terminal(tmp_path, write_tar):
    write_tar(tmp_path / "data" / "a.tar", {"\x1b[2J\nlit-lora: done.jpg": b"", "\x1b[2J\nlit-lora: done.txt": b"x"})
    with pytest.raises(UserError, match=r"\\x1b\[2J\\nlit-lora: done: the image is empty") as error:
        pack_folder(tmp_path / "data", tmp_path / "out")
    assert "\x1b" not in str(error.value)
    assert len(str(error.value).splitlines()) == 2
    line = json.loads((tmp_path / "out" / "bad.jsonl").read_text())
    assert line["file"] == "a.tar: \x1b[2J\nlit-lora: done"


def test_sparse_members_are_named(tmp_path, encode_image):
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for name, data, kind in (
            ("0.jpg", encode_image(), tarfile.REGTYPE),
            ("0.txt", b"0", tarfile.REGTYPE),
            ("1.jpg", b"", b"S"),
        ):
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind
            archive.addfile(info, io.BytesIO(data))
    with pytest.raises(UserError, match=r"a.tar: 1.jpg: is no regular file"):
        pack_folder(tmp_path / "data", tmp_path / "out")
