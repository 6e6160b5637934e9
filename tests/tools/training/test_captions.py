from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lit_lora.datamodules.decoding.captions import Captions
from lit_lora.datamodules.packing.pack import pack_folder
from lit_lora.errors import UserError
from lit_lora.tools.training.captions import caption_rule, prompts_for
from lit_lora.tools.training.images import Images


def _folder(folder: Path, captioned: int = 0, plain: int = 0) -> Path:
    for number in range(captioned + plain):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
        if number < captioned:
            (folder / f"{number}.txt").write_text("a cat")
    return folder


@pytest.mark.parametrize(
    ("captions", "captioned", "trigger", "template", "prefix"),
    [
        ("auto", 2, None, None, ""),
        ("auto", 2, "sks", None, "sks, "),
        ("auto", 0, "sks", "sks", ""),
        ("trigger", 2, "a {sks} {name}", "a {sks} {name}", ""),
        ("names", 2, "sks", "{name}", "sks, "),
        ("folders", 0, None, "{folder}", ""),
    ],
)
def test_where_captions_come_from(
    captions: str, captioned: int, trigger: str | None, template: str | None, prefix: str, tmp_path: Path
) -> None:
    folder = _folder(tmp_path, captioned, 0 if captioned else 2)
    rule = caption_rule(folder, tmp_path / "out", captions, trigger)
    assert (rule.template and rule.template.text, rule.prefix) == (template, prefix)
    if captions == "trigger":
        assert rule.template is not None
        assert rule.template.caption("0.png", folder) == b"a {sks} {name}"


@pytest.mark.parametrize(
    ("captions", "captioned", "plain", "trigger", "message"),
    [
        ("auto", 0, 2, None, "the images have no captions.*give --trigger"),
        ("trigger", 0, 2, None, "give --trigger"),
        ("auto", 3, 2, None, "2 of 5 images have no caption, first 3.png: write a .txt"),
        ("files", 3, 2, "sks", "2 of 5 images have no caption, first 3.png: write a .txt"),
        ("files", 0, 2, "sks", "2 of 2 images have no caption"),
        ("auto", 0, 0, "sks", "holds no images"),
    ],
)
def test_captions_that_are_missing(
    captions: str, captioned: int, plain: int, trigger: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        caption_rule(_folder(tmp_path, captioned, plain), tmp_path / "out", captions, trigger)


def test_images_without_a_caption_file_get_the_trigger_alone(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    rule = caption_rule(_folder(images, captioned=2, plain=1), tmp_path / "out", "auto", "sks")
    assert "1 of 3 images have no file and get it alone" in rule.choice.why
    pack_folder(images, tmp_path / "out", fallback=rule.fallback)
    found = Images.of(tmp_path / "out").captions
    assert [Captions(prefix=rule.prefix).draw({"txt": text.encode()}, 0, 0) for text in found] == [
        "sks, a cat",
        "sks, a cat",
        "sks",
    ]
    assert set(prompts_for(found, rule.prefix)) == {"sks, a cat", "sks"}


def test_prompts_are_spread_over_the_captions() -> None:
    assert prompts_for([f"{number}" for number in range(8)], "sks, ") == ["sks, 0", "sks, 2", "sks, 4", "sks, 6"]
    assert prompts_for(["sks", "sks"], "") == ["sks"] * 4
