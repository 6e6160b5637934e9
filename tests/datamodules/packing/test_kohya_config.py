from __future__ import annotations

from pathlib import Path

import pytest

from lit_lora.datamodules import ImageDecoder, ShardSet
from lit_lora.datamodules.decoding.captions import Captions
from lit_lora.datamodules.packing.kohya_config import read_kohya_config
from lit_lora.errors import UserError

CONFIG = """
[general]
shuffle_caption = true
caption_extension = ".txt"
keep_tokens = 1
enable_bucket = true
bucket_no_upscale = true
color_aug = false

[[datasets]]
resolution = [768, 768]
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = "girl"
  class_tokens = "hoge girl"
  num_repeats = 10
  flip_aug = true
  caption_prefix = "sks,"
  caption_dropout_rate = 0.1

  [[datasets.subsets]]
  is_reg = true
  image_dir = "/images/reg"
  class_tokens = "girl"
  keep_tokens = 3
  shuffle_caption = false
  random_crop = true
  caption_extension = ".caption"
  caption_suffix = "photo"
  enable_wildcard = true
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "dataset.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_each_key_is_followed(write, tmp_path):
    found = read_kohya_config(write(CONFIG))
    girl, reg = found.sets
    assert (girl.name, girl.folder, girl.repeats, girl.fallback) == ("girl", tmp_path / "girl", 10, "hoge girl")
    assert (girl.caption_extension, girl.prior) == ("txt", False)
    assert (reg.name, reg.folder, reg.repeats, reg.fallback) == ("reg", Path("/images/reg"), 1, "girl")
    assert (reg.caption_extension, reg.prior) == ("caption", True)
    assert found.data == {"batch_size": 4, "resolution": 768, "buckets": {"divisor": 64}}
    assert found.notes == (
        "bucket_no_upscale has no effect: small images are enlarged; buckets.max_upscaling: 1 leaves them out",
        "caption_prefix stays first when captions are shuffled, and keep_tokens counts the tags after it",
        "keep_tokens has no effect without shuffle_caption",
        "enable_wildcard draws alternatives, but not one of several lines; captions can be a list in a .json file",
    )


def test_the_options_of_decoders_are_those_of_kohyas_scripts(write):
    decoders = [
        ImageDecoder(**{**options, "captions": Captions(**options["captions"])})
        for one in read_kohya_config(write(CONFIG)).sets
        if (options := dict(one.decoder or {}))
    ]
    assert decoders == [
        ImageDecoder(True, True, Captions(dropout=0.1, shuffle_tags=True, keep_tags=2, prefix="sks, ")),
        ImageDecoder(False, False, Captions(suffix=" photo", wildcards=True)),
    ]
    assert ShardSet("x", decoder=decoders[0]).decoder is decoders[0]


def test_squares_and_defaults(write):
    found = read_kohya_config(write('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\n'))
    assert found.data == {"buckets": None}
    [one] = found.sets
    assert (one.repeats, one.fallback, one.caption_extension, one.prior) == (1, "", "caption", False)
    assert one.decoder == {
        "center_crop": True,
        "random_flip": False,
        "mask": None,
        "captions": {
            "dropout": 0,
            "shuffle_tags": False,
            "keep_tags": 0,
            "separator": ", ",
            "prefix": "",
            "suffix": "",
            "wildcards": False,
        },
    }


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("keep_tokens = 1\n", "keep_token = 1\n", "keep_token is unknown"),
        ("color_aug = false", "color_aug = true", "color_aug = True is not supported"),
        ("keep_tokens = 1\n", 'keep_tokens = "1"\n', None),  # a data set has its own
        ("keep_tokens = 2", 'keep_tokens = "2"', "keep_tokens = '2' has the wrong type"),
        ("num_repeats = 10", "num_repeats = true", "num_repeats = True has the wrong type"),
        ("num_repeats = 10", "num_repeats = 0", "num_repeats = 0 is too small"),
        (
            "num_repeats = 10",
            "num_repeats = 10\nresolution = 512",
            "resolution is in a subset, and holds for whole data sets",
        ),
        (
            "num_repeats = 10",
            'metadata_file = "x.json"',
            "metadata_file = 'x.json' is not supported: write metadata.jsonl",
        ),
        ('image_dir = "girl"\n', "", "a subset has no image_dir"),
        ('".caption"', '".tags"', "caption_extension = '.tags' is not read"),
        ("[768, 768]", "[512, 768]", r"no square; write the edge of one with this area, 627"),
        ("[general]", "[generel]", "generel: is no table"),
        ('"/images/reg"', '"./girl"', "girl is named more than once; name it once, and raise its repeats"),
        ("[[datasets]]", "[[dataset]]", r"has no \[\[datasets\]\]"),
        ("[[datasets.subsets]]", "[[datasets.subset]]", r"has no \[\[datasets.subsets\]\]"),
        ("[general]", "[general", "is not a TOML file"),
    ],
)
def test_what_cannot_be_followed_is_named(write, old, new, message):
    path = write(CONFIG.replace(old, new))
    if message is None:
        read_kohya_config(path)
        return
    with pytest.raises(UserError, match=message):
        read_kohya_config(path)


def test_all_mistakes_are_told_at_once(write):
    other = '[[datasets]]\nresolution = 512\nbatch_size = 4\nkeep_tokens = -1\nx = 1\n[[datasets.subsets]]\nimage_dir = "b"\n'
    with pytest.raises(UserError) as caught:
        read_kohya_config(write(CONFIG.replace("color_aug = false", "color_aug = true") + other))
    message = str(caught.value)
    assert message.count("color_aug") == 1
    assert "x is unknown" in message
    assert "resolution is [768, 768] and 512 in different data sets" in message


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none.toml: No such file"):
        read_kohya_config(tmp_path / "none.toml")
