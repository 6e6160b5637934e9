"""Damage of all kinds, with the messages of training and of `lit-lora shards check`."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from lit_lora.datamodules import WebDatasetDataModule
from lit_lora.datamodules.checking.check import check_shards
from lit_lora.errors import UserError

KEYS = ["0000", "0001", "0002", "0003"]
BAD = "0002"
BLOCK = 512


def _encode(width: int = 48, height: int = 40, image_format: str = "JPEG", **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


def _flip(data: bytes, places: range) -> bytes:
    damaged = bytearray(data)
    for place in places:
        damaged[place] ^= 0xFF
    return bytes(damaged)


def _animation(image_format: str) -> bytes:
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, image_format, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def _bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return buffer.getvalue()


JPEG, PNG = _encode(), _encode(image_format="PNG")


class Case(NamedTuple):
    """Damage, and the messages that report it.

    Attributes:
        training: Part of the message of training about the shard or one sample; empty if there is none.
        check: Kind of problem that the check finds; empty if there is none.
        at_start: Whether the run is refused at the start.
        members: Members that replace those of one sample, by extension.
        damage: Function that damages the shard, from its bytes and the offset of that sample's first header.
    """

    training: str
    check: str
    at_start: bool = False
    members: dict[str, bytes] | Callable[[], dict[str, bytes]] | None = None
    damage: Callable[[bytes, int], bytes] = lambda data, _: data


CASES = {
    # The image
    "flipped bytes in a PNG": Case(
        "cannot be decoded", "undecodable image", members={"png": _flip(PNG, range(900, 904)), "txt": b"x"}
    ),
    "flipped bytes in the pixels of a JPEG": Case("", "", members={"jpg": _flip(JPEG, range(900, 902)), "txt": b"x"}),
    "flipped bytes in the header of a JPEG": Case(
        "header cannot be read", "unreadable image header", members={"jpg": _flip(JPEG, range(4)), "txt": b"x"}
    ),
    "zeros in the pixels of a JPEG": Case("", "", members={"jpg": JPEG[:700] + bytes(100) + JPEG[800:], "txt": b"x"}),
    "cut image": Case("cannot be decoded", "undecodable image", members={"jpg": JPEG[:-300], "txt": b"x"}),
    "image of 0 bytes": Case("header cannot be read", "empty image", members={"jpg": b"", "txt": b"x"}),
    "GIF that is called .jpg": Case(
        "header cannot be read", "unreadable image header", members={"jpg": _encode(image_format="GIF"), "txt": b"x"}
    ),
    "PNG that is called .jpg": Case("", "wrong extension", members={"jpg": PNG, "txt": b"x"}),
    "image of 20,000 x 20,000 pixels in a small file": Case(
        "has 20000 x 20000 pixels, more than 100000000",
        "too many pixels",
        members=lambda: {"png": _bomb(), "txt": b"x"},
    ),
    "animated WebP": Case("nimat", "undecodable image", members={"webp": _animation("WEBP"), "txt": b"x"}),
    "animated PNG": Case("nimat", "undecodable image", members={"png": _animation("PNG"), "txt": b"x"}),
    "no image": Case("1 of 4 samples have no image", "no image", at_start=True, members={"txt": b"x"}),
    # The caption
    "caption in Latin-1": Case("not UTF-8", "caption not UTF-8", members={"jpg": JPEG, "txt": b"caf\xe9"}),
    "caption of 5 MB": Case(
        "5000000 bytes, more than 1048576", "caption too long", members=lambda: {"jpg": JPEG, "txt": b"x" * 5_000_000}
    ),
    "empty caption": Case("", "empty caption", members={"jpg": JPEG, "txt": b"\n"}),
    "no caption": Case("1 of 4 samples have no caption", "no caption", at_start=True, members={"jpg": JPEG}),
    "JSON of 17 MB": Case(
        "bytes, more than 16777216",
        "caption too long",
        members=lambda: {"jpg": JPEG, "json": b'{"caption": "' + b"x" * 17_000_000 + b'"}'},
    ),
    "damaged JSON": Case(
        "json member is not valid", "unreadable caption", members={"jpg": JPEG, "json": b'{"caption": "x'}
    ),
    "JSON without a caption": Case("no text", "unreadable caption", members={"jpg": JPEG, "json": b"{}"}),
    # The archive
    "flipped bytes in a header": Case(
        "no member starts there",
        "damaged shard",
        at_start=True,
        damage=lambda data, at: _flip(data, range(at + 3, at + 5)),
    ),
    "a header of zeros": Case(
        "no member starts there",
        "damaged shard",
        at_start=True,
        damage=lambda data, at: data[:at] + bytes(BLOCK) + data[at + BLOCK :],
    ),
    "cut within a member": Case(
        "truncated or damaged", "damaged shard", at_start=True, damage=lambda data, at: data[: at + BLOCK + 100]
    ),
    "cut within a header": Case(
        "truncated or damaged", "damaged shard", at_start=True, damage=lambda data, at: data[: at + 100]
    ),
    "cut between two members": Case(
        "the end of the archive is missing", "damaged shard", at_start=True, damage=lambda data, at: data[:at]
    ),
    "only the end marker cut off": Case(
        "the end of the archive is missing",
        "damaged shard",
        at_start=True,
        damage=lambda data, _: data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % BLOCK),
    ),
    "nothing but zeros": Case("holds no samples", "no samples", at_start=True, damage=lambda data, _: bytes(len(data))),
    "an empty file": Case("truncated or damaged", "damaged shard", at_start=True, damage=lambda *_: b""),
    "a sample that comes again later": Case(
        "holds the key '0000' twice",
        "duplicate key",
        at_start=True,
        damage=lambda data, at: data[:at] + data[: at // 2] + data[at:],
    ),
    "a member that comes twice": Case(
        "holds the key '0001' twice",
        "duplicate key",
        at_start=True,
        damage=lambda data, at: data[:at] + data[at // 2 :],
    ),
}


def _write(path: Path, case: Case, write_tar: Callable[..., Path]) -> Path:
    replaced = case.members() if callable(case.members) else case.members
    members: dict[str, bytes] = {}
    start = 0
    for key in KEYS:
        if key == BAD:
            start = sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for data in members.values())
        here = replaced if key == BAD and replaced is not None else {"jpg": JPEG, "txt": f"caption {key}".encode()}
        members |= {f"{key}.{extension}": data for extension, data in here.items()}
    write_tar(path, members)
    path.write_bytes(case.damage(path.read_bytes(), start))
    return path


@pytest.mark.parametrize("name", CASES)
def test_what_training_and_the_check_say(tmp_path, write_tar, name):
    case = CASES[name]
    path = _write(tmp_path / "x.tar", case, write_tar)

    summary = check_shards([path])
    assert list(summary.counts) == ([case.check] if case.check else [])
    if case.check and not case.at_start:
        assert [problem.key for problem in summary.examples[case.check]] == [BAD]

    data = WebDatasetDataModule(str(path), batch_size=4, resolution=16, max_bad_samples=1, num_workers=0)
    if case.at_start:
        with pytest.raises(UserError, match=f"{path}.*{case.training}|{case.training}.*{path}"):
            data.setup("fit")
        return
    data.setup("fit")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (batch,) = data.train_dataloader()
    good = [key for key, weight in zip(batch["key"], batch["weight"].tolist(), strict=True) if weight == 1]
    assert batch["pixel_values"].shape == (4, 3, 16, 16)
    if not case.training:
        assert (sorted(good), caught) == (KEYS, [])
        return
    assert sorted(good) == [key for key in KEYS if key != BAD]
    assert batch["weight"].sum() == 3
    (warning,) = caught
    assert f"bad sample {BAD} in {path}" in str(warning.message)
    assert case.training in str(warning.message)
    # Past the limit, training ends with the same reason.
    strict = WebDatasetDataModule(str(path), batch_size=4, resolution=16, max_bad_samples=0, num_workers=0)
    strict.setup("fit")
    with pytest.raises(UserError, match=f"1 bad samples, more than max_bad_samples=0.*\n.*{BAD} in .*{case.training}"):
        list(strict.train_dataloader())


def test_the_docs_say_what_was_tested() -> None:
    """Each case has a row in the table of the page on data, with these messages."""
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text().split("## What damage looks like")[1]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    rows = [row for row in cells if len(row) == 3]
    for name, case in CASES.items():
        assert any(
            row[1].startswith("refused at the start") == case.at_start
            and (case.training in row[1] if case.training else row[1].startswith("as usual"))
            and (case.check in row[2] if case.check else row[2] == "nothing")
            for row in rows
        ), name
