from __future__ import annotations

import json
import os

import pytest
from PIL import Image
from safetensors.torch import save
from torch import zeros

from lit_lora.datamodules.checking import check
from lit_lora.datamodules.checking.check import check_shards
from lit_lora.errors import UserError


@pytest.fixture
def found(tmp_path, write_tar):
    """Kinds and keys of the problems found in a shard of these members."""

    def find(members, **options):
        path = write_tar(tmp_path / "x.tar", members)
        summary = check_shards([path], report=tmp_path / "report.jsonl", **options)
        lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
        assert sum(summary.counts.values()) == len(lines)
        assert summary.is_clean == all(line["note"] for line in lines)
        return [(line["kind"], line["key"]) for line in lines]

    return find


def test_clean_shards(make_shards):
    summary = check_shards(make_shards(3, 2))
    assert (summary.shards, summary.samples, summary.counts, summary.is_clean) == (2, 5, {}, True)


def test_images(found, encode_image):
    jpeg = encode_image(64, 48)
    images = {
        "cut.jpg": jpeg[:-500],
        "empty.jpg": b"",
        "gone.txt": b"x",
        "noise.png": b"no image",
        "png.jpg": encode_image(format="PNG"),
        "w.webp": encode_image(format="WEBP"),
        "x.jpeg": jpeg,
    }
    members = images | {f"{name.partition('.')[0]}.txt": b"x" for name in images}
    members = dict(sorted(members.items()))
    structural = [
        ("empty image", "empty"),
        ("no image", "gone"),
        ("unreadable image header", "noise"),
        ("wrong extension", "png"),
    ]
    assert found(members, decode=False) == structural
    assert found(members) == [("undecodable image", "cut"), *structural]


@pytest.mark.parametrize(("width", "height"), [(13_000, 8_000), (20_000, 20_000)])
def test_images_of_too_many_pixels_are_not_decoded(found, tmp_path, width, height):
    Image.new("1", (width, height)).save(tmp_path / "x.png")
    assert found({"a.png": (tmp_path / "x.png").read_bytes(), "a.txt": b"x"}) == [("too many pixels", "a")]


def test_header_behind_long_metadata(found, encode_image):
    """The header follows 64 KiB of metadata; only then does the check without decoding read the whole image."""
    image = encode_image()
    comment = b"\xff\xfe" + (60_002).to_bytes(2, "big") + bytes(60_000)  # not every Pillow writes so long ones
    image = image[:2] + 2 * comment + image[2:]
    assert found({"a.jpg": image, "a.txt": b"x"}, decode=False) == []


def test_captions(found, encode_image):
    image = encode_image()
    captions = {
        "a.txt": b" \n",
        "b.txt": b"caf\xe9",
        "c.txt": b"x" * (1 << 20) + b"x",
        "d.json": b'{"text": "x"}',
        "e.json": b"{",
        "f.pt": b"",
        "g.cls": b"3",
        "h.json": b'{"caption": "x", "y": "' + b"y" * (16 << 20) + b'"}',
        "i.txt": b"x" * (1 << 20),
    }
    members = {}
    for name, data in captions.items():
        members |= {f"{name[0]}.jpg": image, name: data}
    expected = [
        ("members not read", "f.pt"),
        ("empty caption", "a"),
        ("caption not UTF-8", "b"),
        ("caption too long", "c"),
        ("unreadable caption", "d"),
        ("unreadable caption", "e"),
        ("no caption", "f"),
        ("caption too long", "h"),
    ]
    assert found(members) == expected
    expected.remove(("unreadable caption", "d"))
    assert found(members, caption_key="text") == [*expected[:-2], ("no caption", "f"), ("caption too long", "h")]


def test_cached_samples(found):
    latents = save({"x": zeros(4)})
    members = {"a.safetensors": latents, "a.txt": b"x", "b.safetensors": latents[:-1], "b.txt": b"x"}
    assert found(members) == [("undecodable image", "b")]
    assert found(members, decode=False) == []


def test_keys_in_a_shard(found, encode_image):
    image = encode_image()
    members = {
        "a.jpg": image,
        "a.txt": b"x",
        "b.jpg": image,
        "b.txt": b"x",
        "b.JPG": b"",
        "a.json": b"{}",
        "a.png": b"",
    }
    assert found(members) == [("duplicate key", "b"), ("duplicate key", "a")]


def test_names_that_are_not_samples(found, encode_image):
    members = {
        "a.v1.jpg": encode_image(),
        "b.v1.jpg": b"",
        "README": b"",
        ".hidden": b"",
        "a.jpg": encode_image(),
        "a.txt": b"x",
    }
    assert found(members) == [
        ("members not read", "a.v1.jpg"),
        ("members not read", "README"),
        ("members not read", ".hidden"),
    ]
    assert found({"README": b""}) == [("no samples", ""), ("members not read", "README")]


def test_keys_of_several_shards(tmp_path, make_shards, write_tar):
    first, second = make_shards(2, 3)
    third = write_tar(tmp_path / "x.tar", dict.fromkeys(("9.jpg", "9.txt", "0003.txt", "0000.txt"), b""))
    summary = check_shards([first, second, third])
    assert summary.counts["keys of another shard"] == 1
    (problem,) = summary.examples["keys of another shard"]
    assert (problem.shard, problem.key) == (str(third), "0003")
    assert problem.detail == f"2 of its 3 keys are in other shards, this one in {second}"


def test_damaged_shards_do_not_hide_the_others(tmp_path, make_shards):
    cut, bad, gone = make_shards(3, 3, 3)
    cut.write_bytes(cut.read_bytes()[:3000])
    data = bytearray(bad.read_bytes())
    data[512:1000] = bytes(488)  # the first image
    bad.write_bytes(data)
    gone.unlink()
    summary = check_shards([cut, bad, gone])
    assert summary.counts == {"damaged shard": 2, "unreadable image header": 1}
    assert [(p.shard, p.detail[:20]) for p in summary.examples["damaged shard"]] == [
        (str(cut), "truncated or damaged"),
        (str(gone), "cannot be read (No s"),
    ]
    assert summary.examples["unreadable image header"][0].key == "0003"


def test_the_summary_has_few_examples_and_the_report_all_problems(tmp_path, write_tar, encode_image):
    path = write_tar(tmp_path / "x.tar", {f"{number}.jpg": encode_image() for number in range(9)})
    summary = check_shards([path], report=tmp_path / "new" / "report.jsonl")
    assert summary.counts == {"no caption": 9}
    assert [problem.key for problem in summary.examples["no caption"]] == ["0", "1", "2"]
    assert len((tmp_path / "new" / "report.jsonl").read_text().splitlines()) == 9
    assert os.listdir(tmp_path / "new") == ["report.jsonl"]


def test_report_of_an_interrupted_check(tmp_path, make_shards, monkeypatch):
    monkeypatch.setattr(check, "check_sample", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        check_shards(make_shards(2), report=tmp_path / "new" / "report.jsonl")
    assert os.listdir(tmp_path / "new") == []


def test_wrong_jobs(make_shards):
    with pytest.raises(UserError, match="jobs=0 is too small"):
        check_shards(make_shards(1), jobs=0)


@pytest.mark.slow
def test_jobs_change_nothing(tmp_path, make_shards):
    paths = make_shards(2, 2, 2)
    paths[1].write_bytes(paths[1].read_bytes()[:-10_000])
    summaries = [check_shards(paths, jobs=jobs, report=tmp_path / f"{jobs}.jsonl") for jobs in (1, 2)]
    assert summaries[0] == summaries[1]
    assert (tmp_path / "1.jsonl").read_text() == (tmp_path / "2.jsonl").read_text() != ""


def test_masks_and_sources(found, encode_image):
    image, other = encode_image(24, 16), encode_image(24, 8)
    mask, small = encode_image(24, 16, "PNG"), encode_image(8, 8, "PNG")
    members = {"a.jpg": image, "a.mask.png": mask, "a.txt": b"x", "b.jpg": image, "b.mask.png": small, "b.txt": b"x"}
    members |= {"c.jpg": image, "c.source.jpg": other, "c.txt": b"x"}
    assert found(members) == [("unusable mask", "b"), ("unusable source image", "c")]
    assert found(members, decode=False) == []
