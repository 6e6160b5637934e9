from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from lit_lora.datamodules import ShardIndex, WebDatasetDataModule
from lit_lora.datamodules.indexing.data_index import DataIndex
from lit_lora.datamodules.packing import pack
from lit_lora.datamodules.packing.pack import pack_folder
from lit_lora.errors import UserError
from tests.helpers import contents_of_shards


@pytest.fixture
def folder(tmp_path, encode_image):
    """Seven images in two subfolders."""
    root = tmp_path / "images"
    for number in range(7):
        image = root / ("cats" if number % 2 else "dogs") / f"img.{number}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(encode_image(seed=number))
        image.with_suffix(".txt").write_text(f"caption {number}\n")
    return root


def _files(out, pattern="*.tar"):
    return {path.name: path.read_bytes() for path in sorted(out.glob(pattern))}


def _bad(out):
    return [json.loads(line) for line in (out / "bad.jsonl").read_text().splitlines()]


def test_masks_are_packed_with_their_images(folder, tmp_path, encode_image):
    """From a folder, and from the shards made of it; an image of that name that belongs to no other is no mask."""
    mask, alone = (encode_image(format="PNG", seed=seed) for seed in (8, 9))
    (folder / "dogs" / "img.2.mask.png").write_bytes(mask)
    (folder / "dogs" / "ski.mask.png").write_bytes(alone)
    (folder / "dogs" / "ski.mask.txt").write_text("a ski mask")
    for out, source in ((tmp_path / "out", folder), (tmp_path / "again", tmp_path / "out")):
        assert pack_folder(source, out).samples == 8
        contents = contents_of_shards(out)
        assert contents["dogs/img_2.mask.png"] == mask
        assert contents["dogs/img_2.txt"] == b"caption 2\n"
        assert contents["dogs/ski_mask.png"] == alone
        assert len(contents) == 17
    assert ShardIndex.load_or_build(next(tmp_path.glob("again/*.tar"))).member_extension.max() == 11


def test_sources_are_packed_with_their_targets(folder, tmp_path, encode_image):
    """From a folder, and from the shards made of it; sources that training would refuse make their samples bad."""
    source, other = encode_image(48, 32, format="WEBP"), encode_image(24, 16, seed=8)
    (folder / "dogs" / "img.2.source.webp").write_bytes(source)
    (folder / "cats" / "img.3.source.jpeg").write_bytes(other)
    for out, given in ((tmp_path / "out", folder), (tmp_path / "again", tmp_path / "out")):
        assert pack_folder(given, out).samples == 7
        contents = contents_of_shards(out)
        assert contents["dogs/img_2.source.webp"] == source
        assert contents["cats/img_3.source.jpg"] == other
        assert len(contents) == 16
    (folder / "cats" / "img.3.source.jpeg").write_bytes(encode_image(16, 16))
    assert pack_folder(folder, tmp_path / "bad", max_bad=1).samples == 6
    assert [bad["reason"] for bad in _bad(tmp_path / "bad")] == [
        "the source has 16 x 16 pixels, and the image 24 x 16: crop them to one aspect ratio"
    ]


@pytest.mark.parametrize("extension", ["bmp", "tiff", "jfif"])
def test_sources_of_other_formats_are_packed_as_shards_hold_them(folder, tmp_path, encode_image, extension):
    jpeg = encode_image(24, 16, format="JPEG")
    with Image.open(io.BytesIO(jpeg)) as image:
        pixels = np.asarray(image)
        source = folder / "cats" / f"img.3.source.{extension}"
        source.write_bytes(jpeg) if extension == "jfif" else image.save(source)
    packed = pack_folder(folder, tmp_path / "out").samples
    name = "cats/img_3.source.jpg" if extension == "jfif" else "cats/img_3.source.png"
    with Image.open(io.BytesIO(contents_of_shards(tmp_path / "out")[name])) as found:
        assert np.abs(np.asarray(found).astype(int) - pixels).max() == 0
    source.write_bytes(b"no image")
    assert pack_folder(folder, tmp_path / "bad", max_bad=1).samples == packed - 1
    assert [bad["reason"].split(":")[0] for bad in _bad(tmp_path / "bad")] == ["source image"]


def test_all_samples_and_their_bytes(folder, tmp_path, encode_image):
    out = tmp_path / "out"
    summary = pack_folder(folder, out, samples_per_shard=3)

    assert list(_files(out)) == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    contents = contents_of_shards(out)
    assert len(contents) == 14
    assert contents["dogs/img_2.jpg"] == encode_image(seed=2)
    assert contents["cats/img_3.txt"] == b"caption 3\n"
    assert (summary.shards, summary.samples, summary.resumed, summary.bad) == (3, 7, 0, [])
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["samples"] == 7
    assert manifest["bytes"] == summary.size == sum(len(data) for data in _files(out).values())
    assert [(shard["name"], shard["samples"]) for shard in manifest["shards"]] == [
        ("shard-000000.tar", 3), ("shard-000001.tar", 3), ("shard-000002.tar", 1),
    ]  # fmt: skip
    assert not list(out.glob("*.part"))


def test_indexes_for_other_programs(folder, tmp_path):
    out = tmp_path / "out"
    pack_folder(folder, out, samples_per_shard=4)
    sizes = {name: len(data) for name, data in _files(out).items()}
    assert json.loads((out / "sizes.json").read_text()) == {"shard-000000.tar": 4, "shard-000001.tar": 3}
    assert json.loads((out / "shardindex.json").read_text()) == {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "shardlist": [
            {"url": "shard-000000.tar", "nsamples": 4, "filesize": sizes["shard-000000.tar"]},
            {"url": "shard-000001.tar", "nsamples": 3, "filesize": sizes["shard-000001.tar"]},
        ],
    }
    assert len(DataIndex.load(out / "shards.index")) == 7


def test_indexes_are_up_to_date(folder, tmp_path, monkeypatch):
    pack_folder(folder, tmp_path / "out", samples_per_shard=3)
    monkeypatch.delattr("lit_lora.datamodules.indexing.index.scan_shard")
    assert [len(ShardIndex.load_or_build(path)) for path in sorted((tmp_path / "out").glob("*.tar"))] == [3, 3, 1]


def test_webdataset_and_the_datamodule_read_it(folder, tmp_path, encode_image):
    out = tmp_path / "out"
    pack_folder(folder, out)
    with (out / "shard-000000.tar").open("rb") as file:
        samples = list(group_by_keys(tar_file_expander([{"url": "shard", "stream": file}])))
    assert [sample["txt"] for sample in samples] == [f"caption {n}\n".encode() for n in (1, 3, 5, 0, 2, 4, 6)]
    assert [sample["jpg"] for sample in samples[:2]] == [encode_image(seed=1), encode_image(seed=3)]

    data = WebDatasetDataModule(str(out), batch_size=7, resolution=8, num_workers=0)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert sorted(batch["caption"]) == [f"caption {number}" for number in range(7)]


def test_bytes_do_not_depend_on_place_time_or_jobs(folder, tmp_path):
    copy = tmp_path / "copy"
    for path in folder.rglob("*.*"):
        (copy / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        (copy / path.relative_to(folder)).write_bytes(path.read_bytes())
    pack_folder(folder, tmp_path / "one", samples_per_shard=3, shuffle_seed=1)
    pack_folder(copy, tmp_path / "two", samples_per_shard=3, shuffle_seed=1)
    assert _files(tmp_path / "one") == _files(tmp_path / "two")
    with tarfile.open(tmp_path / "one" / "shard-000000.tar") as archive:
        owners = {(member.mtime, member.mode, member.uid, member.gid, member.uname, member.gname) for member in archive}
    assert owners == {(0, 0o644, 0, 0, "root", "root")}


@pytest.mark.slow
def test_jobs_change_nothing(folder, tmp_path):
    (folder / "dogs" / "img.2.jpg").write_bytes(b"no image")
    one = pack_folder(folder, tmp_path / "one", samples_per_shard=2, max_bad=1)
    two = pack_folder(folder, tmp_path / "two", samples_per_shard=2, max_bad=1, jobs=2)
    assert _files(tmp_path / "one") == _files(tmp_path / "two")
    assert _files(tmp_path / "one", "*.json*").keys() == _files(tmp_path / "two", "*.json*").keys()
    assert (tmp_path / "one" / "manifest.json").read_text() == (tmp_path / "two" / "manifest.json").read_text()
    assert (one.samples, one.bad) == (two.samples, two.bad)


def test_shuffle(folder, tmp_path):
    pack_folder(folder, tmp_path / "sorted")
    pack_folder(folder, tmp_path / "one", shuffle_seed=1)
    pack_folder(folder, tmp_path / "two", shuffle_seed=2)
    orders = [list(contents_of_shards(tmp_path / name)) for name in ("sorted", "one", "two")]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] != orders[2]


def test_shards_stay_within_their_bytes(folder, tmp_path):
    pack_folder(folder, tmp_path / "out", max_shard_bytes=8000)
    samples = [len(ShardIndex.build(path)) for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert sum(samples) == 7
    assert len(samples) > 2
    with_end = 8000 + 10240  # a tar ends on a block of 10240 bytes
    assert all(len(data) <= with_end for data in _files(tmp_path / "out").values())


def test_finished_shards_are_kept(folder, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    pack_folder(folder, whole, samples_per_shard=2)
    read, seen = pack._read, []

    def fail_within_the_third(*arguments):
        seen.append(arguments)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return read(*arguments)

    monkeypatch.setattr(pack, "_read", fail_within_the_third)
    with pytest.raises(KeyboardInterrupt):
        pack_folder(folder, out, samples_per_shard=2)
    assert len(_files(out)) == 2
    assert not list(out.glob("*.part"))
    assert not (out / "manifest.json").exists()

    for name in ("shard-000002.tar", "shard-000001.tar.index", "shards.index", "plan.json", "bad.jsonl"):
        (out / f"{name}.123.part").write_bytes(b"half")  # of a process that was killed
    monkeypatch.setattr(pack, "_read", read)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    summary = pack_folder(folder, out, samples_per_shard=2)

    assert (summary.shards, summary.resumed, summary.samples) == (4, 2, 7)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert _files(out) == _files(whole)
    assert (out / "manifest.json").read_text() == (whole / "manifest.json").read_text()
    assert not list(out.glob("*.part"))


def test_other_files_or_options_do_not_mix(folder, tmp_path, write_tar):
    out = tmp_path / "out"
    pack_folder(folder, out)
    with pytest.raises(UserError, match="holds shards of other files or options"):
        pack_folder(folder, out, samples_per_shard=2)
    (folder / "dogs" / "img.0.txt").write_text("another caption")
    with pytest.raises(UserError, match="holds shards of other files or options"):
        pack_folder(folder, out)
    write_tar(tmp_path / "foreign" / "x.tar", {"a.txt": b"a"})
    with pytest.raises(UserError, match="were not packed here"):
        pack_folder(folder, tmp_path / "foreign")
    assert list(_files(tmp_path / "foreign")) == ["x.tar"]


@pytest.fixture
def damaged(folder, encode_image):
    """The folder with four bad images among seven."""
    (folder / "cats" / "img.1.jpg").write_bytes(encode_image()[:-50])
    (folder / "cats" / "img.3.txt").unlink()
    (folder / "cats" / "img.5.txt").write_bytes(b"caf\xe9")
    (folder / "dogs" / "img.0.jpg").write_bytes(b"")
    return folder


def test_bad_files_are_listed(damaged, tmp_path):
    out = tmp_path / "out"
    summary = pack_folder(damaged, out, max_bad=4)

    assert summary.samples == 3
    assert sorted(contents_of_shards(out)) == [f"dogs/img_{n}.{ext}" for n in (2, 4, 6) for ext in ("jpg", "txt")]
    bad = _bad(out)
    assert [line["file"] for line in bad] == ["cats/img.1.jpg", "cats/img.3.jpg", "cats/img.5.jpg", "dogs/img.0.jpg"]
    for line, reason in zip(bad, ("cannot be decoded", "no caption", "not UTF-8", "empty"), strict=True):
        assert reason in line["reason"]
    # Started again, it finds all shards and still knows what is bad.
    again = pack_folder(damaged, out, max_bad=4)
    assert again.resumed == 1
    assert _bad(out) == bad


def test_shard_of_bad_files_alone_is_left_out(damaged, tmp_path):
    out = tmp_path / "out"
    pack_folder(damaged, out, samples_per_shard=2, max_bad=4)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (
        [shard["name"] for shard in manifest["shards"]] == list(_files(out)) == ["shard-000001.tar", "shard-000002.tar"]
    )


def test_a_caption_that_cannot_be_read_is_named(folder, tmp_path, monkeypatch):
    read = Path.read_bytes

    def denied(path):
        if path.suffix == ".txt":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(UserError, match=r"img.0.jpg: img.0.txt cannot be read \(Permission denied\)"):
        pack_folder(folder, tmp_path / "out")


def test_too_many_bad_files_are_all_named_at_once(damaged, tmp_path):
    """Those found while planning, while reading and while decoding, although the limit is exceeded from the start."""
    out = tmp_path / "out"
    (damaged / "dogs" / "img.6.gif").write_bytes(b"GIF89a")
    expected = ["cats/img.1.jpg", "cats/img.3.jpg", "cats/img.5.jpg", "dogs/img.0.jpg", "dogs/img.6.gif"]
    for max_bad, options in ((0, {}), (1, {}), (4, {"samples_per_shard": 2})):
        with pytest.raises(
            UserError, match=rf"(?s)5 bad files, more than max_bad={max_bad};.*img.3.jpg: has no caption.*img.0"
        ):
            pack_folder(damaged, out, max_bad=max_bad, **options)
        assert [line["file"] for line in _bad(out)] == expected
        assert not list(out.glob("*.part"))
    assert pack_folder(damaged, out, max_bad=5, samples_per_shard=2).samples == 3


def test_a_share_of_bad_files_is_rounded_up(damaged, tmp_path):
    """Four of seven are bad."""
    with pytest.raises(UserError, match="4 bad files, more than max_bad=3;"):
        pack_folder(damaged, tmp_path / "out", max_bad=0.4)  # of 2.8 files
    assert pack_folder(damaged, tmp_path / "out", max_bad=0.5).samples == 3  # of 3.5 files


def test_repaired_files_go_on_in_the_same_folder(damaged, tmp_path, encode_image):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="4 bad files"):
        pack_folder(damaged, out, max_bad=3)  # all but the last is known while planning
    assert pack_folder(damaged, out, max_bad=4).samples == 3
    with pytest.raises(UserError, match="holds shards of other files or options"):
        (damaged / "cats" / "img.1.jpg").write_bytes(encode_image(seed=1))
        pack_folder(damaged, out, max_bad=4)  # what is complete is kept


def test_shards_of_an_unfinished_run_make_way_for_repaired_files(folder, tmp_path, encode_image):
    out = tmp_path / "out"
    (folder / "dogs" / "img.6.jpg").write_bytes(encode_image()[:-50])
    with pytest.raises(UserError, match="1 bad file"):
        pack_folder(folder, out, samples_per_shard=2)
    assert list(_files(out))
    (folder / "dogs" / "img.6.jpg").write_bytes(encode_image(seed=6))
    summary = pack_folder(folder, out, samples_per_shard=2)
    assert (summary.samples, summary.resumed, _bad(out)) == (7, 0, [])
    pack_folder(folder, tmp_path / "new", samples_per_shard=2)
    assert _files(out) == _files(tmp_path / "new")


def test_nothing_but_bad_files(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"no image")
    (tmp_path / "images" / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"none of 1 files can be packed, first a.jpg: the image's header"):
        pack_folder(tmp_path / "images", tmp_path / "out", max_bad=5)


def test_json_captions(tmp_path, encode_image):
    root = tmp_path / "images"
    root.mkdir()
    for name in "ab":
        (root / f"{name}.jpg").write_bytes(encode_image())
        (root / f"{name}.json").write_text(json.dumps({"prompt": name}))
    with pytest.raises(UserError, match=r"a.jpg: there is no text in .txt or under the key 'caption' in .json"):
        pack_folder(root, tmp_path / "first")
    pack_folder(root, tmp_path / "out", caption_key="prompt")
    assert sorted(contents_of_shards(tmp_path / "out")) == ["a.jpg", "a.json", "b.jpg", "b.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard=0"),
        ({"max_shard_bytes": 0}, "max_shard_bytes=0"),
        ({"jobs": 0}, "jobs=0"),
        ({"max_bad": -1}, "max_bad=-1"),
        ({"max_bad": 1.5}, "max_bad=1.5 is no number of files; give a whole number, or a share below 1"),
        ({"prefix": "a/b"}, "prefix='a/b' cannot be part of a file name"),
        ({"prefix": ""}, "prefix=''"),
    ],
)
def test_arguments_are_checked(folder, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        pack_folder(folder, tmp_path / "out", **options)


def test_wrong_folders(tmp_path):
    with pytest.raises(UserError, match="absent does not exist; name the folder or file"):
        pack_folder(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(UserError, match="holds no images"):
        pack_folder(tmp_path, tmp_path / "out")
