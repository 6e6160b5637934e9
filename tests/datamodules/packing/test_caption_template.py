from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lit_lora.datamodules.indexing.open_table import open_table
from lit_lora.datamodules.loading.shard_reader import ShardReader
from lit_lora.datamodules.packing.caption_template import CaptionTemplate
from lit_lora.datamodules.packing.pack import pack_folder
from lit_lora.errors import UserError


@pytest.mark.parametrize(
    ("text", "file", "caption"),
    [
        ("{name}", "red_fox-01.png", "red fox"),
        ("{name}", "a/Red  Fox (12).jpg", "Red Fox"),
        ("{name}", "0012.png", "0012"),
        ("a {folder}, {name}", "10_grey_fox/x.y.png", "a grey fox, x.y"),
        ("a {folder}", "x.png", "a my images"),
        ("sks", "x.png", "sks"),
    ],
)
def test_the_words_of_names(text: str, file: str, caption: str) -> None:
    assert CaptionTemplate(text).caption(file, Path("my_images")).decode() == caption


@pytest.mark.parametrize(
    ("text", "message"), [(" ", "captions is empty"), ("a {file}", r"has the field \{file\}; choose from")]
)
def test_wrong_templates(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CaptionTemplate(text)


def test_packing_makes_captions_and_reads_no_files_of_them(tmp_path: Path) -> None:
    folder, out = tmp_path / "images", tmp_path / "shards"
    folder.mkdir()
    for name in ("red_fox", "blue_fox"):
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    (folder / "red_fox.txt").write_text("not this")
    (folder / "metadata.jsonl").write_text('{"file_name": "red_fox.png", "text": "nor this"}\n')
    Image.new("L", (8, 8), 255).save(folder / "red_fox.mask.png")
    summary = pack_folder(folder, out, captions="a {name}")
    assert {left.file: left.count for left in summary.skipped} == {"red_fox.txt": 1, "metadata.jsonl": 1}
    reader = ShardReader(open_table(str(out)))
    members = [reader.read(sample, ("txt", "png", "mask.png")) for sample in range(2)]
    assert [one["txt"] for one in members] == [b"a blue fox", b"a red fox"]
    assert ["mask.png" in one for one in members] == [False, True]
    with pytest.raises(UserError, match="holds shards of other files or options"):
        pack_folder(folder, out, captions="the {name}")
