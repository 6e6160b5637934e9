"""Editing pairs from two folders, from columns of tables, and from tars."""

from __future__ import annotations

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lit_lora.cli import main
from lit_lora.datamodules.packing.pack import pack_folder
from lit_lora.errors import UserError
from tests.helpers import contents_of_shards


@pytest.fixture
def folders(tmp_path, encode_image):
    """Makes images of the given paths in tmp_path; targets get captions."""

    def make(*names):
        for number, name in enumerate(names):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_image(encode_image, path.suffix, number))
            if name.startswith("targets/"):
                path.with_suffix(".txt").write_text(f"make {path.stem}")
        return tmp_path / "targets", tmp_path / "sources"

    return make


def _image(encode_image, ending, seed):
    formats = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".tiff": "TIFF"}
    return encode_image(24, 16, seed=seed, format=formats[ending])


def _left_out(out):
    lines = [json.loads(line) for line in (out / "bad.jsonl").read_text().splitlines()]
    return {line["file"]: line["reason"] for line in lines}


def _pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB").tobytes()


def test_two_folders(folders, tmp_path):
    """Sources of any format at the same places as their targets, the same shards from one and from two jobs."""
    targets, sources = folders(
        "targets/1.jpg", "targets/a/1.png", "targets/a/x.y.png", "sources/1.png", "sources/a/1.bmp", "sources/a/x.y.jpg"
    )
    assert pack_folder(targets, tmp_path / "out", sources=sources).samples == 3
    contents = contents_of_shards(tmp_path / "out")
    names = ["1.jpg", "1.source.png", "1.txt", "a/1.png", "a/1.source.png", "a/1.txt"]
    assert sorted(contents) == [*names, "a/x_y.png", "a/x_y.source.jpg", "a/x_y.txt"]
    assert contents["1.source.png"] == (sources / "1.png").read_bytes()
    assert _pixels(contents["a/1.source.png"]) == _pixels((sources / "a" / "1.bmp").read_bytes())
    assert contents["a/1.txt"] == b"make 1"
    pack_folder(targets, tmp_path / "apart", sources=sources, samples_per_shard=1, jobs=2, shuffle_seed=1)
    assert contents_of_shards(tmp_path / "apart") == contents


def test_what_does_not_match_is_named(folders, tmp_path):
    targets, sources = folders(
        "targets/1.jpg", "targets/2.jpg", "targets/3.jpg", "targets/4.jpg", "targets/4.source.jpg", "targets/5.jpg",
        "sources/1.jpg", "sources/3.jpg", "sources/3.png", "sources/4.jpg", "sources/5.jpg", "sources/6.jpg",
    )  # fmt: skip
    (targets / "5.txt").unlink()
    (sources / "note.doc").write_text("x")
    summary = pack_folder(targets, tmp_path / "out", sources=sources, max_bad=4)
    assert (summary.samples, len(summary.bad), len(summary.skipped)) == (1, 4, 2)
    assert _left_out(tmp_path / "out") == {
        "2.jpg": f"has no source, an image 2.* at the same place in {sources}",
        "3.jpg": "has 2 sources, 3.jpg and 3.png; remove all but one",
        "4.jpg": f"has two sources, {sources / '4.jpg'} and one beside it (.source.jpg); remove one",
        "5.jpg": "has no caption (a .txt or .json file of the same name)",
        str(sources / "6.jpg"): "is a source to which no image belongs; add the image and its caption, or remove it",
        str(sources / "note.doc"): "files that end in .doc are not packed",
    }


def test_splits_of_both_folders(folders, tmp_path):
    names = [f"{folder}/{split}/1.jpg" for folder in ("targets", "sources") for split in ("train", "validation")]
    targets, sources = folders(*names)
    summary = pack_folder(targets, tmp_path / "out", sources=sources)
    assert (summary.samples, summary.bad) == (1, [])
    assert sorted(entry.file for entry in summary.skipped) == [f"{sources}/validation/", "validation/"]


def test_a_changed_source_is_packed_anew(folders, tmp_path, encode_image):
    targets, sources = folders("targets/1.jpg", "sources/1.jpg")
    pack_folder(targets, tmp_path / "out", sources=sources)
    (sources / "1.jpg").write_bytes(_image(encode_image, ".png", 77))
    with pytest.raises(UserError, match="other"):
        pack_folder(targets, tmp_path / "out", sources=sources)


def test_folders_that_cannot_be_paired(folders, tmp_path, capsys):
    targets, sources = folders("targets/1.jpg", "sources/1.jpg")
    (tmp_path / "rows.jsonl").write_text('{"file_name": "targets/1.jpg", "text": "x"}\n')
    cases = {
        str(tmp_path / "gone"): (targets, "is no folder; name the folder of the source images"),
        str(targets): (targets, "contain one another; keep them in folders side by side"),
        str(tmp_path): (targets, "contain one another"),
        str(sources): (tmp_path / "rows.jsonl", "is none; name the column of the sources with source_column"),
    }
    for given, (source, message) in cases.items():
        assert main(["shards", "pack", str(source), str(tmp_path / "out"), "--sources", given]) == 2
        assert message in capsys.readouterr().err
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("1.jpg", "1.txt"):
            archive.add(targets / name, name)
    (tmp_path / "shards").mkdir()
    (tmp_path / "x.tar").rename(tmp_path / "shards" / "x.tar")
    with pytest.raises(UserError, match="holds images inside tables or shards; pack them with a column or a member"):
        pack_folder(tmp_path / "shards", tmp_path / "out", sources=sources)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    ("image", "source"), [("file_name", "source_file_name"), ("output_file_name", "input_file_name")]
)
def test_columns_of_metadata(folders, tmp_path, kind, image, source):
    """Of the columns of paths that datasets prescribes, one is the source; it is not named as an image that is not listed."""
    folders("data/1.jpg", "data/s1.png", "data/2.jpg", "data/sub/s2.bmp", "data/3.jpg")
    data = tmp_path / "data"
    rows = [
        {image: "1.jpg", source: "s1.png", "text": "day to night"},
        {image: "2.jpg", source: "sub/s2.bmp", "text": "night to day"},
    ]
    _write_table(data / f"metadata.{kind}", rows)
    summary = pack_folder(data, tmp_path / "out")
    assert [entry.file for entry in summary.skipped] == ["3.jpg"]
    contents = contents_of_shards(tmp_path / "out")
    assert sorted(contents) == ["1.jpg", "1.source.png", "1.txt", "2.jpg", "2.source.png", "2.txt"]
    assert contents["1.source.png"] == (data / "s1.png").read_bytes()
    assert _pixels(contents["2.source.png"]) == _pixels((data / "sub" / "s2.bmp").read_bytes())


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_without_a_source(folders, tmp_path, encode_image, kind):
    folders("data/1.jpg", "data/2.jpg", "data/3.jpg", "data/4.jpg", "data/4.source.jpg", "data/s.jpg")
    rows = [
        {"file_name": "1.jpg", "before": "s.jpg", "text": "x"},
        {"file_name": "2.jpg", "before": "gone.jpg", "text": "x"},
        {"file_name": "3.jpg", "before": None, "text": "x"},
        {"file_name": "4.jpg", "before": "s.jpg", "text": "x"},
    ]
    _write_table(tmp_path / "data" / f"metadata.{kind}", rows)
    options = {"source_column": "before", "max_bad": 3}
    assert pack_folder(tmp_path / "data", tmp_path / "out", **options).samples == 1
    left_out = _left_out(tmp_path / "out")
    reasons = {file: reason for file, reason in left_out.items() if "listed in no table" not in reason}
    nameless = "3.jpg" if kind == "parquet" else "metadata.jsonl, line 3"
    assert list(reasons) == sorted(["2.jpg", nameless, "4.jpg"])
    assert "cannot be read" in reasons["2.jpg"]
    assert "source" in reasons[nameless] or "before" in reasons[nameless]
    assert reasons["4.jpg"] == "has two sources, s.jpg and one beside it (.source.jpg); remove one"


def test_sources_inside_parquet(tmp_path, encode_image):
    """The columns of InstructPix2Pix and of data sets like it: structs of bytes and path, the source first."""
    picture = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    before, after = encode_image(24, 16, seed=1, format="PNG"), encode_image(24, 16, seed=2)
    rows = {
        "original_image": pa.array([{"bytes": before, "path": "a.png"}, {"bytes": None, "path": None}], picture),
        "edit_prompt": ["make it red", "x"],
        "edited_image": pa.array([{"bytes": after, "path": "b.jpg"}, {"bytes": after, "path": "c.jpg"}], picture),
    }
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "data" / "0.parquet")
    pack_folder(tmp_path / "data", tmp_path / "out", max_bad=1)
    assert contents_of_shards(tmp_path / "out") == {
        "000000000.jpg": after,
        "000000000.source.png": before,
        "000000000.txt": b"make it red",
    }
    assert _left_out(tmp_path / "out") == {"0.parquet, row 1": "source image: has no image"}


def test_a_column_with_a_common_name_is_no_source_without_a_target(tmp_path, folders):
    folders("data/1.jpg")
    (tmp_path / "rows.jsonl").write_text('{"image": "data/1.jpg", "original_image": "http://a/1.jpg", "text": "x"}\n')
    pack_folder(tmp_path / "rows.jsonl", tmp_path / "out")
    contents = contents_of_shards(tmp_path / "out")
    assert json.loads(contents["data/1.json"]) == {"original_image": "http://a/1.jpg"}


@pytest.mark.parametrize("ending", ["jpeg", "bmp", "tiff"])
def test_sources_inside_tars(tmp_path, encode_image, ending):
    source = _image(encode_image, f".{ending}".replace("jpeg", "jpg"), 1)
    members = {"1.jpg": encode_image(24, 16), "1.txt": b"x", f"1.source.{ending}": source}
    folder = tmp_path / "data"
    folder.mkdir()
    for name, data in members.items():
        (folder / name).write_bytes(data)
    with tarfile.open(folder / "x.tar", "w") as archive:
        for name in members:
            archive.add(folder / name, name)
            (folder / name).unlink()
    assert pack_folder(folder, tmp_path / "out").skipped == []
    contents = contents_of_shards(tmp_path / "out")
    name = "1.source.jpg" if ending == "jpeg" else "1.source.png"
    assert _pixels(contents[name]) == _pixels(source)


def test_two_sources_beside_an_image(folders, tmp_path):
    """Both would be converted to one member."""
    targets, _ = folders("targets/1.jpg", "targets/1.source.bmp", "targets/1.source.tiff", "targets/2.jpg")
    pack_folder(targets, tmp_path / "out", max_bad=1)
    assert _left_out(tmp_path / "out") == {
        "1.jpg": "has more than one source (source.bmp, source.tiff); remove all but one"
    }


def _write_table(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
