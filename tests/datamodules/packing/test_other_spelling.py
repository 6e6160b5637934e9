from __future__ import annotations

import unicodedata

import pytest

from lit_lora.datamodules.packing.other_spelling import other_spelling
from lit_lora.datamodules.packing.pack import pack_folder
from lit_lora.errors import UserError

TOGETHER, APART = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("there", "wanted", "reason"),
    [
        (APART, TOGETHER, "is written with another Unicode form"),
        (TOGETHER, APART, "is written with another Unicode form"),
        ("A", "a", "differs in capitals"),
        ("a", "A", "differs in capitals"),
        ("b", "a", ""),
    ],
)
def test_files_of_nearly_the_same_name(tmp_path, encode_image, there, wanted, reason):
    """Named as the hint of a function, of a missing caption and of a missing image in a table."""
    hint = f"; {there}.txt {reason}: give both the same name" if reason else ""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / f"{there}.txt").write_text("a caption")
    assert other_spelling(folder / f"{wanted}.txt") == hint
    (folder / f"{wanted}.png").write_bytes(encode_image(format="PNG"))
    with pytest.raises(UserError) as error:
        pack_folder(folder, tmp_path / "out")
    assert f"{wanted}.png: has no caption (a .txt or .json file of the same name){hint}" in str(error.value)
    (folder / "metadata.csv").write_text(f"file_name,text\n{there}.png,a caption\n")
    with pytest.raises(UserError) as error:
        pack_folder(folder, tmp_path / "out")
    image = f"; {wanted}.png {reason}: give both the same name" if reason else ""
    assert f"{there}.png: cannot be read (No such file or directory){image}" in str(error.value)


def test_a_caption_of_nearly_the_same_name_that_is_left_out(tmp_path, encode_image):
    (tmp_path / "a.png").write_bytes(encode_image(format="PNG"))
    (tmp_path / "A.txt").write_text("a caption")
    summary = pack_folder(tmp_path, tmp_path / "out", fallback="another")
    [left_out] = summary.skipped
    assert left_out.reason == "is no caption of an image beside it; a.png differs in capitals: give both the same name"
