"""What a folder holds beside the samples is counted and named."""

from __future__ import annotations

import json
import tarfile

import pytest

from lit_lora.cli import main
from lit_lora.datamodules.packing.pack import pack_folder


@pytest.fixture
def folder(tmp_path, encode_image):
    """Makes images, with captions of the same names, and returns their folder."""

    def make(*names, captions=True):
        for number, name in enumerate(names):
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_image(seed=number))
            if captions:
                path.with_suffix(".txt").write_text(name)
        return tmp_path / "data"

    return make


def _left_out(out):
    lines = [json.loads(line) for line in (out / "bad.jsonl").read_text().splitlines()]
    return {line["file"]: (line["reason"], line.get("count", 1)) for line in lines}


def _write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_captions_with_an_ending_in_capitals(folder, tmp_path):
    data = folder("a.jpg", "B.JPG", "c.jpg", "d.jpg", "e.jpg", captions=False)
    for name in ("a.TXT", "B.Txt", "c.JSON", "d.txt", "d.TXT", "e.tXT", "f.TXT"):
        (data / name).write_text(json.dumps({"caption": name}))
    summary = pack_folder(data, tmp_path / "out", max_bad=1)
    assert (summary.samples, [entry.file for entry in summary.bad]) == (4, ["e.jpg"])
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}
    texts = {name: json.loads(data)["caption"] for name, data in members.items() if not name.endswith(".jpg")}
    assert texts == {"a.txt": "a.TXT", "B.txt": "B.Txt", "c.json": "c.JSON", "d.txt": "d.txt"}
    assert _left_out(tmp_path / "out") == {
        "d.TXT": ("is beside d.txt, which is read", 1),
        "e.jpg": ("has no caption (a .txt or .json file of the same name)", 1),
        "e.tXT": ("has the ending .tXT; write .txt", 1),
        "f.TXT": ("is no caption of an image beside it", 1),
    }


def test_files_beside_images(folder, tmp_path):
    data = folder("a.jpg", "b.jpg")
    for name in ("c.txt", "x.mp4", "sub/y.mp4", "a.npz", "old.tar.gz", "rest.zip", "blob"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_bytes(b"x")
    for name in ("README.md", "LICENSE", ".gitattributes", ".cache/z.lock", "dataset_info.json", "._a.jpg"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).touch()
    (data / "rows.csv").write_text("image,text\n")
    summary = pack_folder(data, tmp_path / "out")
    assert (summary.samples, summary.bad) == (2, [])
    assert _left_out(tmp_path / "out") == {
        "c.txt": ("is no caption of an image beside it", 1),
        "dataset_info.json": ("is no caption of an image beside it", 1),
        "sub/y.mp4": ("files that end in .mp4 are not packed", 2),
        "a.npz": ("files that end in .npz are not packed", 1),
        "old.tar.gz": ("is a compressed tar; decompress it (gunzip), then pack it", 1),
        "rest.zip": ("is an archive; unpack it, then pack the folder", 1),
        "blob": ("has no extension, so its format is unknown", 1),
        "rows.csv": ("is a .csv file beside data of another kind; pack it by its name", 1),
    }


def test_shards_beside_images(folder, tmp_path, make_shards):
    make_shards(2, folder="data")
    pack_folder(folder("a.jpg"), tmp_path / "out")
    assert _left_out(tmp_path / "out") == {
        "shard-000000.tar": ("is a .tar file beside data of another kind; pack it by its name", 1)
    }


def test_packed_shards_are_packed_anew_without_remarks(tmp_path, make_shards):
    make_shards(2, folder="first")
    pack_folder(tmp_path / "first", tmp_path / "second")
    summary = pack_folder(tmp_path / "second", tmp_path / "third")
    assert (summary.samples, summary.bad, summary.skipped) == (2, [], [])


@pytest.mark.parametrize("extension", ["jsonl", "csv", "parquet"])
def test_images_that_no_table_lists(folder, tmp_path, extension):
    data = folder("a.jpg", "b.jpg", "sub/a.png", "sub/c.tif", captions=False)
    rows = [{"file_name": "./a.jpg", "text": "a"}, {"file_name": "sub/a.png", "text": ""}]
    if extension == "jsonl":
        _write_lines(data / "metadata.jsonl", *rows)
    elif extension == "csv":
        (data / "metadata.csv").write_text("file_name,text\n./a.jpg,a\nsub/a.png,\n")
    else:
        pa = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.Table.from_pylist(rows), data / "metadata.parquet")
    # Without a caption in the last row, this image is bad in a text file while it is found, in Parquet when it is read.
    summary = pack_folder(data, tmp_path / "out", max_bad=1)
    assert summary.samples == 1
    reason = ("is listed in no table beside it; add a row with its caption", 1)
    found = _left_out(tmp_path / "out")
    assert {name for name, left_out in found.items() if left_out == reason} == {"b.jpg", "sub/c.tif"}
    assert found.keys() == {"b.jpg", "sub/c.tif", "sub/a.png"}


@pytest.mark.parametrize("with_table", ["none", "each", "root"])
def test_train_is_packed_and_other_splits_are_named(folder, tmp_path, with_table, capsys):
    data = folder("train/0.jpg", "train/1.jpg", "validation/0.jpg", "test/0.jpg", captions=with_table == "none")
    if with_table == "each":
        for split, count in (("train", 2), ("validation", 1), ("test", 1)):
            rows = [{"file_name": f"{number}.jpg", "text": split} for number in range(count)]
            _write_lines(data / split / "metadata.jsonl", *rows)
    elif with_table == "root":
        names = ["train/0.jpg", "train/1.jpg", "validation/0.jpg", "test/0.jpg"]
        _write_lines(data / "metadata.jsonl", *({"file_name": name, "text": name} for name in names))
    assert main(["shards", "pack", str(data), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "samples  2\n" in printed
    assert "left out 2 (see" in printed
    assert (
        f"  1  validation/: is another split than train; pack it apart: lit-lora shards pack {data}/validation OUT"
        in printed
    )
    assert _left_out(tmp_path / "out").keys() == {"validation/", "test/"}
    assert pack_folder(data / "validation", tmp_path / "val", max_bad=1).samples == 1 if with_table != "root" else True


def test_repeat_numbers_of_kohya_are_not_applied_and_said_so(folder, tmp_path, capsys):
    data = folder("10_cat/a.jpg", "5_dog/a.jpg", "other/a.jpg")
    assert main(["shards", "pack", str(data), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "samples  3\n" in printed
    lines = " ".join(printed.split())
    assert "note the numbers that begin the names of 2 folders, first 10_cat, are not applied as repeats" in lines
    (data / "10_cat-2").symlink_to(data / "10_cat")  # what the note advises
    assert pack_folder(data, tmp_path / "more").samples == 4


def test_columns_that_are_not_packed_are_named(tmp_path, encode_image):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"image": [encode_image()], "text": ["x"], "embedding": [[1.0, 2.0]], "size": [3]})
    parquet.write_table(table, tmp_path / "x.parquet")
    summary = pack_folder(tmp_path / "x.parquet", tmp_path / "out")
    assert summary.notes == ["the columns embedding are neither texts nor numbers and not packed"]


def test_a_folder_of_archives_says_so(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.tar.gz").touch()
    with pytest.raises(
        ValueError, match=r"(?s)holds no images.*x.tar.gz: is a compressed tar; decompress it \(gunzip\)"
    ):
        pack_folder(tmp_path / "data", tmp_path / "out")


def test_formats_with_captions_are_packed_or_named(folder, tmp_path, encode_image):
    data = folder("a.jpg")
    for extension, image_format in (
        ("bmp", "BMP"),
        ("GIF", "GIF"),
        ("tiff", "TIFF"),
        ("TIF", "TIFF"),
        ("jfif", "JPEG"),
        ("JPE", "JPEG"),
    ):
        (data / f"in_{extension}.{extension}").write_bytes(encode_image(format=image_format))
        (data / f"in_{extension}.txt").write_text(extension)
    (data / "x.jxl").write_bytes(b"\xff\x0a jxl")
    (data / "x.txt").write_text("x")
    summary = pack_folder(data, tmp_path / "out", max_bad=1)
    assert summary.samples == 7
    assert [file.file for file in summary.bad] == ["x.jxl"]
    assert summary.bad[0].reason.startswith("is not one of the image formats")


@pytest.mark.parametrize("name", ["a.mask.PNG", "a.Mask.png", "a.mask.jpg", "gone.mask.png", "gone.source.bmp"])
def test_masks_and_sources_that_are_packed_with_no_image_are_never_trained_on(folder, tmp_path, name):
    """With captions from names or a trigger, every image has a caption, and so would the masks."""
    data = folder("a.jpg", "b.jpg", name, captions=False)
    for options in ({"captions": "a {name}"}, {"fallback": "sks"}):
        summary = pack_folder(data, tmp_path / next(iter(options)), max_bad=1, **options)
        assert summary.samples == 2
        [entry] = summary.bad
        assert entry.file == name
        assert f"is named like a {name.split('.')[1].lower()} and belongs to no image" in entry.reason


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.parquet"])
def test_masks_and_sources_beside_images_in_a_table_are_packed(folder, tmp_path, table):
    data = folder("a.jpg", "a.mask.png", "b.jpg", "b.source.jpeg", "c.jpg", "d.mask.png", captions=False)
    rows = [{"file_name": f"{name}.jpg", "text": name} for name in "abc"]
    if table.endswith("jsonl"):
        _write_lines(data / table, *rows)
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), data / table)
    pack_folder(data, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as archive:
        names = archive.getnames()
    assert names == ["a.jpg", "a.mask.png", "a.txt", "b.jpg", "b.source.jpg", "b.txt", "c.jpg", "c.txt"]
    assert list(_left_out(tmp_path / "out")) == ["d.mask.png"]


def test_columns_that_only_a_later_parquet_file_has_are_named(tmp_path, encode_image):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    row = {"jpg": encode_image(), "text": "a"}
    for number, more in enumerate(({}, {"author": "b"})):
        parquet.write_table(pyarrow.Table.from_pylist([row | more]), tmp_path / f"{number}.parquet")
    [note] = pack_folder(tmp_path, tmp_path / "out").notes
    assert "the columns author of" in note
    assert "1.parquet are not packed" in note
