"""Packing of every kind of input."""

from __future__ import annotations

import csv
import json
import os
import pickle
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_lora.datamodules import ShardIndex
from lit_lora.datamodules.packing import find_input as find_input_module
from lit_lora.datamodules.packing.column_table import ColumnTable
from lit_lora.datamodules.packing.find_input import find_input
from lit_lora.datamodules.packing.image_folder import ImageFolder
from lit_lora.datamodules.packing.image_table import ImageTable
from lit_lora.datamodules.packing.pack import pack_folder
from lit_lora.datamodules.packing.parquet import ParquetFile
from lit_lora.datamodules.packing.tar_files import TarFiles
from lit_lora.errors import UserError
from tests.helpers import contents_of_shards


def _shards(out):
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


def _bad(out):
    lines = [json.loads(line) for line in (out / "bad.jsonl").read_text().splitlines()]
    return {line["file"]: line["reason"] for line in lines}


@pytest.fixture
def images(tmp_path, encode_image):
    """Makes images in the folder ``data`` and returns it."""

    def make(*names, **options):
        for number, name in enumerate(names):
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_image(seed=number, **options))
        return tmp_path / "data"

    return make


def _write_csv(path, *rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def _write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# Images that metadata files list


def test_metadata_jsonl(tmp_path, images):
    folder = images("b.jpg", "sub/a.png", "c.jpg", "not_listed.jpg")
    _write_lines(
        folder / "metadata.jsonl",
        {"file_name": "b.jpg", "text": "a fox", "score": 3, "artist": "Ü"},
        {"file_name": "sub/a.png", "caption": "a hen"},
        {"file_name": "c.jpg", "score": 1},
    )
    pack_folder(folder, tmp_path / "out", max_bad=1)

    contents = contents_of_shards(tmp_path / "out")
    assert list(contents) == ["b.jpg", "b.txt", "b.json", "sub/a.png", "sub/a.txt"]
    assert (contents["b.txt"], contents["sub/a.txt"]) == (b"a fox", b"a hen")
    assert json.loads(contents["b.json"]) == {"score": 3, "artist": "Ü"}
    assert _bad(tmp_path / "out") == {
        "c.jpg": "has no caption (a text under text or caption)",
        "not_listed.jpg": "is listed in no table beside it; add a row with its caption",
    }


@pytest.mark.parametrize("write", [_write_csv, _write_lines])
def test_metadata_in_subfolders_describes_what_lies_below(tmp_path, images, write):
    folder = images("train/x/1.jpg", "more/1.jpg")
    extension = "csv" if write is _write_csv else "jsonl"
    write(folder / "train" / f"metadata.{extension}", {"file_name": "x/1.jpg", "text": "train"})
    write(folder / "more" / f"metadata.{extension}", {"file_name": "1.jpg", "text": "more"})
    pack_folder(folder, tmp_path / "out")
    contents = contents_of_shards(tmp_path / "out")
    assert list(contents) == ["more/1.jpg", "more/1.txt", "train/x/1.jpg", "train/x/1.txt"]
    pack_folder(folder, tmp_path / "apart", samples_per_shard=1)
    assert contents_of_shards(tmp_path / "apart") == contents
    assert (contents["more/1.txt"], contents["train/x/1.txt"]) == (b"more", b"train")
    assert contents["train/x/1.jpg"] == (folder / "train/x/1.jpg").read_bytes()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"text": "x"}',
            "has no column with a usual name .file_name, .*; set image_column to one of its columns: text",
        ),
        ('{"file_name": 3, "text": "x"}', "line 1: the column file_name has no path of an image"),
        ("{", "line 1: not JSON"),
        ('{"file_name": "../x.jpg", "text": "x"}', "line 1: ../x.jpg is outside the folder"),
        ('{"file_name": "/x.jpg", "text": "x"}', "line 1: /x.jpg is outside"),
        ('{"file_name": "https://a.org/x.jpg", "text": "x"}', "line 1: https://a.org/x.jpg is a URL; download"),
    ],
)
def test_wrong_metadata(tmp_path, line, message):
    (tmp_path / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        pack_folder(tmp_path, tmp_path / "out")


def test_metadata_of_missing_and_foreign_files(tmp_path):
    rows = [{"file_name": "gone.jpg", "text": "x"}, {"file_name": "x.mp4", "text": "x"}]
    _write_lines(tmp_path / "metadata.jsonl", *rows, {"file_name": "y.jpg", "text": "\ud800"})
    with pytest.raises(
        UserError,
        match=r"(?s)gone.jpg: cannot be read \(No such file.*x.mp4: is not one of the image formats.*y.jpg:.*Unicode",
    ):
        pack_folder(tmp_path, tmp_path / "out")


# Tables of paths


@pytest.mark.parametrize("extension", ["csv", "tsv", "jsonl"])
def test_table_of_paths(tmp_path, images, extension):
    folder = images("a/1.jpg", "2.jpg")
    table = folder / f"list.{extension}"
    rows = [
        {"id": "7", "image_path": "a/1.jpg", "TEXT": 'a "red"\nfox, sitting'},
        {"id": "8", "image_path": str(folder / "2.jpg"), "TEXT": "a hen"},
        {"id": "9", "image_path": "a/1.jpg", "TEXT": "the same fox"},
        {"id": "9", "image_path": "2.jpg", "TEXT": ""},
    ]
    (_write_lines if extension == "jsonl" else _write_csv)(table, *rows)
    summary = pack_folder(table, tmp_path / "out", max_bad=1)

    contents = contents_of_shards(tmp_path / "out")
    assert summary.samples == 3
    assert contents["a/1.txt"] == b'a "red"\nfox, sitting'
    assert contents["a/1-2.txt"] == b"the same fox"
    assert contents["a/1-2.jpg"] == contents["a/1.jpg"] == (folder / "a/1.jpg").read_bytes()
    assert json.loads(contents["a/1.json"]) == {"id": "7"}
    assert [data for name, data in contents.items() if name.endswith("/2.txt")] == [b"a hen"]
    assert _bad(tmp_path / "out") == {"2.jpg": "has no caption (a text under TEXT)"}


def test_columns_are_guessed_or_named(tmp_path, images):
    folder = images("1.jpg")
    _write_csv(folder / "x.csv", {"bild": "1.jpg", "words": "a fox", "text": "not this"})
    with pytest.raises(UserError, match=r"no column with a usual name .*set image_column to .*: bild, words, text"):
        pack_folder(folder / "x.csv", tmp_path / "out")
    with pytest.raises(UserError, match=r"has no column 'Words' \(caption_column\); its columns are bild, words, text"):
        pack_folder(folder / "x.csv", tmp_path / "out", image_column="bild", caption_column="Words")
    pack_folder(folder / "x.csv", tmp_path / "out", image_column="bild", caption_column="words")
    assert contents_of_shards(tmp_path / "out")["1.txt"] == b"a fox"


def test_changed_caption_is_another_plan(tmp_path, images):
    folder = images("1.jpg")
    _write_csv(folder / "x.csv", {"path": "1.jpg", "text": "one"})
    pack_folder(folder / "x.csv", tmp_path / "out")
    assert pack_folder(folder / "x.csv", tmp_path / "out").resumed == 1
    _write_csv(folder / "x.csv", {"path": "1.jpg", "text": "two"})
    with pytest.raises(UserError, match="holds shards of other files or options"):
        pack_folder(folder / "x.csv", tmp_path / "out")


def test_list_of_captions(tmp_path, images):
    folder = images("1.jpg")
    _write_lines(folder / "x.jsonl", {"path": "1.jpg", "captions": ["one", "two"], "id": 1})
    pack_folder(folder / "x.jsonl", tmp_path / "out", caption_key="a.b")
    contents = contents_of_shards(tmp_path / "out")
    assert list(contents) == ["1.jpg", "1.json"]
    assert json.loads(contents["1.json"]) == {"a": {"b": ["one", "two"]}, "id": 1}


# Parquet and arrow


def _image_struct(encode_image, count, image_format="JPEG"):
    images = [encode_image(seed=number, format=image_format) for number in range(count)]
    return images, [{"bytes": image, "path": f"{number}.jpg"} for number, image in enumerate(images)]


@pytest.mark.parametrize("shuffle_seed", [None, 1])
def test_parquet_with_images_inside(tmp_path, encode_image, shuffle_seed):
    images, column = _image_struct(encode_image, 9)
    table = pa.table({"image": column, "text": [f"t{n}" for n in range(9)], "score": [float("nan")] * 9})
    table = table.append_column("embedding", pa.array([[1.0, 2.0]] * 9))
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=4)
    summary = pack_folder(tmp_path / "x.parquet", tmp_path / "out", samples_per_shard=5, shuffle_seed=shuffle_seed)

    assert (summary.samples, summary.shards) == (9, 2)
    contents = contents_of_shards(tmp_path / "out")
    order = [int(name[:9]) for name in contents if name.endswith(".jpg")]
    assert sorted(order) == list(range(9))
    assert (order == sorted(order)) == (shuffle_seed is None)
    for number in range(9):
        assert contents[f"{number:09}.jpg"] == images[number]
        assert contents[f"{number:09}.txt"] == f"t{number}".encode()
        assert json.loads(contents[f"{number:09}.json"]) == {"score": None}


def test_parquet_is_read_a_few_rows_at_a_time(tmp_path, encode_image, monkeypatch):
    monkeypatch.setattr("lit_lora.datamodules.packing.parquet._ROWS", 2)
    images, column = _image_struct(encode_image, 9)
    pq.write_table(pa.table({"image": column, "text": ["x"] * 9}), tmp_path / "x.parquet", row_group_size=5)
    for name, seed in (("sorted", None), ("shuffled", 3)):
        pack_folder(tmp_path / "x.parquet", tmp_path / name, samples_per_shard=4, shuffle_seed=seed)
        contents = contents_of_shards(tmp_path / name)
        assert [contents[f"{number:09}.jpg"] for number in range(9)] == images


def test_parquet_rows_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_lora.datamodules.packing.parquet._ROWS", 2)
    pq.write_table(pa.table({"x": list(range(9))}), tmp_path / "x.parquet", row_group_size=5)
    file = ParquetFile(tmp_path / "x.parquet")
    for row in [8, 4, 3, 0, 5, 1, 7]:
        batch, first = file.batch_with(row, ["x"])
        assert batch.column(0)[row - first].as_py() == row
        assert batch.num_rows <= 2
    assert file.row_blocks().tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 4]


def test_parquet_is_shuffled_by_blocks_and_within_them(tmp_path, encode_image, monkeypatch):
    monkeypatch.setattr("lit_lora.datamodules.packing.parquet._ROWS", 4)
    table = pa.table({"image": [encode_image()] * 40, "text": ["x"] * 40})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=8)
    pack_folder(tmp_path / "x.parquet", tmp_path / "out", shuffle_seed=1)
    rows = np.array([int(name[:9]) for name in contents_of_shards(tmp_path / "out") if name.endswith("jpg")])
    blocks = rows.reshape(10, 4) // 4
    assert (blocks == blocks[:, :1]).all()
    assert sorted(blocks[:, 0]) == list(range(10)) != blocks[:, 0].tolist()
    assert sum((np.diff(block) > 0).all() for block in rows.reshape(10, 4)) < 5


def test_another_column_is_another_plan(tmp_path, encode_image):
    pq.write_table(pa.table({"image": [encode_image()], "a": ["x"], "b": ["y"]}), tmp_path / "x.parquet")
    pack_folder(tmp_path / "x.parquet", tmp_path / "out", caption_column="a")
    with pytest.raises(UserError, match="other files or options"):
        pack_folder(tmp_path / "x.parquet", tmp_path / "out", caption_column="b")


def test_damaged_row_group(tmp_path, encode_image, monkeypatch):
    """The rows before the damage and in other groups are packed."""
    monkeypatch.setattr("lit_lora.datamodules.packing.parquet._ROWS", 1)
    images = [encode_image(seed=number) for number in range(6)]
    table = pa.table({"image": images, "text": ["x"] * 6})
    options = {"compression": "NONE", "use_dictionary": False, "data_page_size": 1, "write_batch_size": 1}
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=3, **options)
    data = bytearray((tmp_path / "x.parquet").read_bytes())
    place = data.index(images[1])
    data[place - 16 : place] = b"\xff" * 16  # the page's header
    (tmp_path / "x.parquet").write_bytes(data)
    pack_folder(tmp_path / "x.parquet", tmp_path / "out", max_bad=2)
    contents = contents_of_shards(tmp_path / "out")
    assert {name: contents[name] for name in contents if name.endswith("jpg")} == {
        f"{number:09}.jpg": images[number] for number in (0, 3, 4, 5)
    }
    assert list(_bad(tmp_path / "out")) == ["x.parquet, row 1", "x.parquet, row 2"]


def test_folder_of_parquet_with_plain_bytes(tmp_path, encode_image):
    for number, image_format in enumerate(("PNG", "WEBP")):
        images = [encode_image(format=image_format, seed=number), b"GIF89a", b"", None]
        path = tmp_path / "data" / f"train-{number}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"jpg": pa.array(images, pa.binary()), "caption": ["x"] * 4}), path)
    pack_folder(tmp_path / "data", tmp_path / "out", max_bad=6)
    assert list(contents_of_shards(tmp_path / "out")) == [
        "000000000.png",
        "000000000.txt",
        "000000004.webp",
        "000000004.txt",
    ]
    bad = _bad(tmp_path / "out")
    assert bad["train-0.parquet, row 1"].startswith("is not one of the image formats")
    assert bad["train-1.parquet, row 2"] == "the image is empty"
    assert bad["train-1.parquet, row 3"] == "has no image"


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_with_paths(tmp_path, images, struct):
    folder = images("a/1.jpg", "2.jpg", "3.jpg")
    paths = ["a/1.jpg", str(folder / "2.jpg"), None, "gone.jpg", "x.gif", "3.jpg"]
    column = [None if path is None else {"bytes": None, "path": path} for path in paths] if struct else paths
    if struct:
        column[2] = {"bytes": None, "path": None}
    pq.write_table(
        pa.table({"image": column, "text": ["one", "two", "x", "x", "x", None]}), folder / "metadata.parquet"
    )
    with pytest.raises(UserError, match="4 bad files"):
        pack_folder(folder, tmp_path / "out", image_column="image")
    summary = pack_folder(folder, tmp_path / "out", image_column="image", max_bad=4)
    assert summary.samples == 2
    contents = contents_of_shards(tmp_path / "out")
    assert contents["a/1.txt"] == b"one"
    assert contents["a/1.jpg"] == (folder / "a/1.jpg").read_bytes()
    bad = _bad(tmp_path / "out")
    assert bad["metadata.parquet, row 2"] == "has no image"
    assert "No such file" in bad["gone.jpg"]
    assert bad["3.jpg"] == "has no caption (a text under text)"


def _save_to_disk(folder, table, files=2):
    """A data set in the format that ``datasets.Dataset.save_to_disk`` writes."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05}-of-{files:05}.arrow" for number in range(files)]
    size = -(-len(table) // files)
    for number, name in enumerate(names):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.slice(number * size, size), max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def test_saved_data_set(tmp_path, encode_image):
    images, column = _image_struct(encode_image, 7)
    _save_to_disk(tmp_path / "data" / "train", pa.table({"img": column, "prompt": [f"p{n}" for n in range(7)]}))
    (tmp_path / "data" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(UserError, match=r"contains several splits; pack one of them: .*/data/train"):
        pack_folder(tmp_path / "data", tmp_path / "out")
    pack_folder(tmp_path / "data" / "train", tmp_path / "out", samples_per_shard=3, shuffle_seed=1)
    contents = contents_of_shards(tmp_path / "out")
    assert [contents[f"{number:09}.jpg"] for number in range(7)] == images
    assert [contents[f"{number:09}.txt"] for number in range(7)] == [f"p{n}".encode() for n in range(7)]


def test_saved_data_set_of_paths(tmp_path, images):
    folder = images("1.jpg", "2.jpg")
    column = [{"bytes": None, "path": str(folder / f"{n}.jpg")} for n in (1, 2)]
    _save_to_disk(tmp_path / "saved", pa.table({"image": column, "text": ["one", "two"]}))
    assert pack_folder(tmp_path / "saved", tmp_path / "out").samples == 2
    (folder / "2.jpg").write_bytes(b"changed")
    with pytest.raises(UserError, match="other files or options"):
        pack_folder(tmp_path / "saved", tmp_path / "out")


def test_wrong_column_files(tmp_path, images):
    folder = images("1.jpg")
    (folder / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"cannot read .*x.parquet as Parquet"):
        pack_folder(folder / "x.parquet", tmp_path / "out")
    pq.write_table(pa.table({"image": [1], "text": ["x"]}), folder / "x.parquet")
    with pytest.raises(UserError, match="the column 'image' holds int64, not images or paths; set image_column"):
        pack_folder(folder / "x.parquet", tmp_path / "out")
    pq.write_table(
        pa.table({"image": pa.array([], pa.string()), "text": pa.array([], pa.string())}), folder / "x.parquet"
    )
    with pytest.raises(UserError, match=r"x.parquet has no rows"):
        pack_folder(folder / "x.parquet", tmp_path / "out")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{"filename": "gone.arrow"}]}')
    with pytest.raises(UserError, match=r"gone.arrow, which .*state.json lists, is missing"):
        pack_folder(tmp_path / "saved", tmp_path / "out")
    (tmp_path / "saved" / "gone.arrow").write_bytes(b"no arrow")
    with pytest.raises(UserError, match="as an Arrow stream"):
        pack_folder(tmp_path / "saved", tmp_path / "out")


def test_pyarrow_is_optional(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r'pip install "lit_lora\[parquet\]"'):
        pack_folder(tmp_path / "x.parquet", tmp_path / "out")


# Shards


def test_img2dataset(tmp_path, encode_image, write_tar):
    """Keys are unique over all shards, and each complete shard has a statistics file and a Parquet file beside it."""
    folder = tmp_path / "data"
    for shard in range(3):
        members = {}
        for number in range(3):
            key = f"{shard:05}{number:04}"
            members |= {
                f"{key}.jpg": encode_image(seed=10 * shard + number),
                f"{key}.json": json.dumps({"caption": f"c{key}", "status": "success"}).encode(),
                f"{key}.txt": f"c{key}".encode(),
            }
        write_tar(folder / f"{shard:05}.tar", members)
        (folder / f"{shard:05}.parquet").write_bytes(b"")
        if shard != 1:
            (folder / f"{shard:05}_stats.json").write_text("{}")
    summary = pack_folder(folder, tmp_path / "out", samples_per_shard=4)

    assert (summary.samples, summary.bad) == (6, [])
    assert [file.file for file in summary.skipped] == ["00001.tar"]
    assert _bad(tmp_path / "out") == {"00001.tar": "00001_stats.json is missing: img2dataset was interrupted"}
    contents = contents_of_shards(tmp_path / "out")
    assert list(contents)[:3] == ["000000000.jpg", "000000000.txt", "000000000.json"]
    assert contents["000020002.jpg"] == encode_image(seed=22)
    assert json.loads(contents["000020002.json"])["caption"] == "c000020002"


def test_shards_are_repaired_by_repacking(tmp_path, encode_image, write_tar):
    """Separated members, keys that are repeated in each shard, foreign members, a damaged shard."""
    folder = tmp_path / "data"
    image = encode_image()
    write_tar(folder / "sub" / "0.tar", {"a.jpg": image, "b.png": image, "b.txt": b"b0", "a.txt": b"a0", "a.x": b"x"})
    write_tar(folder / "1.tar", {"a.jpg": image, "a.cls": b"3", "c.txt": b"no image"})
    (folder / "2.tar").write_bytes((folder / "1.tar").read_bytes()[:700])
    with tarfile.open(folder / "3.tar", "w") as archive:
        for name in ("d.jpg", "d.jpg", "d.txt"):
            archive.addfile(tarfile.TarInfo(name))
    summary = pack_folder(folder, folder / "out", max_bad=3)

    assert summary.samples == 3
    contents = contents_of_shards(folder / "out")
    assert list(contents) == ["a.jpg", "a.cls", "a-2.jpg", "a-2.txt", "b.png", "b.txt"]
    assert (contents["a.cls"], contents["a-2.txt"], contents["b.txt"]) == (b"3", b"a0", b"b0")
    bad = _bad(folder / "out")
    assert bad["1.tar: c"] == "has no image"
    assert "truncated or damaged" in bad["2.tar"]
    assert bad["3.tar: d"] == "has two .jpg members"
    assert len(ShardIndex.load_or_build(folder / "out" / "shard-000000.tar")) == 3
    # The new shards below the folder are no input.
    assert pack_folder(folder, folder / "out", max_bad=3).resumed == 1


def test_one_shard_by_its_name(tmp_path, make_shards):
    (shard,) = make_shards(3)
    pack_folder(shard, tmp_path / "out", samples_per_shard=2)
    assert len(contents_of_shards(tmp_path / "out")) == 6


# All of them


def test_links_are_followed_once(tmp_path, images):
    folder = images("real/1.jpg")
    (folder / "real" / "1.txt").write_text("one")
    (folder / "real" / "back").symlink_to(folder, target_is_directory=True)
    (folder / "link").symlink_to(folder / "real", target_is_directory=True)
    pack_folder(folder, tmp_path / "out")
    assert list(contents_of_shards(tmp_path / "out")) == ["link/1.jpg", "link/1.txt", "real/1.jpg", "real/1.txt"]


def test_file_that_cannot_be_packed(tmp_path, images):
    folder = images("1.jpg")
    (tmp_path / "table").write_text("image,text")
    with pytest.raises(UserError, match=r"cannot pack .*table, whose name has no ending; name a folder, a table"):
        find_input(tmp_path / "table", tmp_path / "out")
    with pytest.raises(UserError, match=r"cannot pack .*1.jpg \(.jpg\); name a folder, a table"):
        pack_folder(folder / "1.jpg", tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a.jpg", "b.tar", "c.parquet"], "ImageFolder"),
        (["b.tar", "c.parquet"], "TarFiles"),
        (["c.parquet", "rows.csv"], "ColumnTable"),
        (["a.jpg", "metadata.csv", "b.tar"], "ImageTable"),
        (["metadata.parquet", "c.parquet", "a.jpg"], "ListedImages"),
        (["rows.csv"], "ImageTable"),
        (["x.arrow"], "SavedDataset"),
        (["metadata.parquet"], "ListedImages"),
    ],
)
def test_the_first_kind_that_finds_samples_is_used(tmp_path, monkeypatch, names, kind):
    for name in names:
        (tmp_path / name).touch()
    found = []
    for each, method in ((ImageFolder, "scan"), (ImageTable, "read"), (TarFiles, "scan"), (ColumnTable, "of")):
        monkeypatch.setattr(each, method, classmethod(lambda cls, *_, **__: found.append(cls.__name__) or cls))
    find_input(tmp_path / names[0] if len(names) == 1 else tmp_path, tmp_path / "out")
    assert found == [kind]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.txt", "rows.csv"], "holds no images .*, no shards and no tables; name another folder"),
        (
            ["a.jpg", "metadata.csv", "metadata.parquet"],
            "metadata.csv and metadata.parquet beside it may list the same images; keep one",
        ),
        (["a.jpg", "metadata.csv", "metadata.jsonl"], "metadata.csv and metadata.jsonl beside it may list"),
        (
            ["x/a.jpg", "x/metadata.csv", "y/a.jpg", "y/metadata.parquet"],
            "has metadata.csv, metadata.parquet, and Parquet files are not packed together with others",
        ),
    ],
)
def test_folders_that_cannot_be_packed(tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        find_input(tmp_path, tmp_path / "out")


def test_a_new_kind_is_one_entry(tmp_path, images, monkeypatch):
    class TextFiles(ImageFolder):
        extensions = ("text",)

        @classmethod
        def find(cls, source):
            return [path.name for path in source.files.get("text", ())] or None

    monkeypatch.setattr(find_input_module, "INPUTS", (TextFiles, *find_input_module.INPUTS))
    (tmp_path / "b.text").touch()
    (tmp_path / "a.text").touch()
    assert find_input(tmp_path, tmp_path / "out") == ["a.text", "b.text"]


def test_selections_work_in_other_processes(tmp_path, encode_image, images, make_shards):
    """The selection of samples that a process receives, of each kind of input, yields the same samples there."""
    _, column = _image_struct(encode_image, 4)
    folder = images("1.jpg", "2.jpg")
    for name in "12":
        (folder / f"{name}.txt").write_text(name)
    _write_csv(tmp_path / "x.csv", {"path": "data/1.jpg", "text": "one"}, {"path": "data/2.jpg", "text": "two"})
    pq.write_table(pa.table({"image": column, "text": list("abcd")}), tmp_path / "x.parquet", row_group_size=3)
    _save_to_disk(tmp_path / "saved", pa.table({"image": column, "text": list("abcd")}))
    make_shards(2, 2, folder="tars")
    for name in ("data", "x.csv", "x.parquet", "saved", "tars"):
        samples = find_input(tmp_path / name, tmp_path / "out")
        here = [(samples.key(n), samples.name(n), samples.members(n)) for n in range(len(samples))]
        assert len(here) in (2, 4)
        part = pickle.loads(pickle.dumps(samples.select(np.arange(len(samples))[::-1])))
        assert [(part.key(n), part.name(n), part.members(n)) for n in range(len(part))] == here[::-1], name
        # Real sizes: a header and whole blocks for each member. Only means are known of images within tables.
        real = [sum(512 + -(-len(data) // 512) * 512 for data in members.values()) for _, _, members in here]
        if name in ("x.parquet", "saved"):
            assert samples.sizes.tolist() == pytest.approx(real, rel=1)
        else:
            assert samples.sizes.tolist() == real, name


@pytest.mark.parametrize("name", ["1.jpg", "1.txt", "1.json", "1.mask.png", "1.source.jpg"])
@pytest.mark.parametrize("kind", ["pipe", "device", "listed"])
def test_pipes_and_devices_are_bad(tmp_path, images, name, kind):
    """Reading them may never end, and a mask that cannot be read is not left out."""
    folder = images("1.jpg", "2.jpg")
    for number in "12":
        (folder / f"{number}.txt").write_text("a caption")
    if kind == "listed":
        (folder / "metadata.csv").write_text("file_name,text\n1.jpg,a\n2.jpg,b\n")
        if name in ("1.txt", "1.json"):
            pytest.skip("tables have the captions")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/dev/zero") if kind == "device" else os.mkfifo(folder / name)
    what = "a device" if kind == "device" else "a pipe"
    with pytest.raises(UserError, match=rf"1 bad file.*\n  1.jpg: {folder / name} is {what}, not a regular file"):
        pack_folder(folder, tmp_path / "out")


def test_a_mask_that_leads_nowhere_is_bad(tmp_path, images):
    folder = images("1.jpg")
    (folder / "1.mask.png").symlink_to("nowhere")
    for table in ("1.txt", "metadata.csv"):
        (folder / table).write_text("file_name,text\n1.jpg,a\n")
        with pytest.raises(UserError, match=r"1\.jpg: 1\.mask\.png cannot be read"):
            pack_folder(folder, tmp_path / "out")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet", "rows.csv", "rows.parquet"])
def test_tables_that_are_pipes(tmp_path, images, name):
    folder = images("1.jpg")
    os.mkfifo(folder / name)
    if not name.startswith("metadata"):
        (folder / "1.jpg").unlink()
    with pytest.raises(UserError, match=f"{folder / name} is a pipe, not a regular file"):
        pack_folder(folder / name if name == "rows.csv" else folder, tmp_path / "out")
