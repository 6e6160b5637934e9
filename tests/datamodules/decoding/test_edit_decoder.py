"""Editing pairs: source and target are framed alike, and unusable sources are bad samples."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lit_lora.datamodules import BadSampleError, EditDecoder, ImageDecoder, ShardSet, WebDatasetDataModule
from lit_lora.errors import UserError
from lit_lora.module import LoraDiffusion
from lit_lora.run_checks import check_data

WriteTar = Callable[[Path, Mapping[str, bytes]], Path]


def encoded(image: Image.Image, format: str = "PNG") -> bytes:  # noqa: A002
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def target() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def members(target: Image.Image) -> dict[str, bytes]:
    """The source is the target's negative."""
    negative = Image.eval(target, lambda value: 255 - value)
    return {"png": encoded(target), "source.png": encoded(negative), "txt": b"invert it"}


def test_source_and_target_get_the_same_crop_and_flip(members: dict[str, bytes]) -> None:
    decoder = EditDecoder(random_flip=True).with_seed(3)
    alone = ImageDecoder(random_flip=True).with_seed(3)
    seen = set()
    for slot in range(20):
        entries = decoder(members, slot, (16, 16), (40, 30))
        expected = alone(members, slot, (16, 16), (40, 30))
        assert torch.equal(entries["pixel_values"], expected["pixel_values"])
        assert entries["caption"] == "invert it"
        difference = entries["source_pixel_values"].int() + entries["pixel_values"] - 255
        assert difference.abs().max() <= 1  # rounding of the resizing
        seen.add((entries["crop_top_left"], decoder.framing.flips(slot)))
    assert len(seen) > 4
    assert {flipped for _, flipped in seen} == {True, False}


def test_a_source_of_another_resolution_shows_the_same_part(members: dict[str, bytes], target: Image.Image) -> None:
    smooth = target.resize((4, 3)).resize((400, 300), Image.Resampling.BICUBIC)
    half = {**members, "png": encoded(smooth), "source.png": encoded(smooth.resize((201, 150)))}
    for slot in range(6):
        entries = EditDecoder().with_seed(3)(half, slot, (16, 16), (400, 300))
        assert (entries["source_pixel_values"].int() - entries["pixel_values"]).abs().max() <= 6


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, r"there is no source image; an editing pair has one of source.jpg, source.png, source.webp"),
        ({"source.png": b"no image"}, "source image: the image's header cannot be read"),
        ({"source.png": encoded(Image.effect_noise((40, 30), 90))[:500]}, "source image: the image cannot be decoded"),
        (
            {"source.jpg": encoded(Image.new("RGB", (40, 32)), "JPEG")},
            "the source has 40 x 32 pixels, and the image 40 x 30: crop them to one aspect ratio",
        ),
        ({"source.jpg": b"", "source.webp": b""}, r"more than one source image \(source.jpg, source.webp\)"),
    ],
)
def test_unusable_sources_are_bad_samples(sources: dict[str, bytes], message: str, members: dict[str, bytes]) -> None:
    del members["source.png"]
    with pytest.raises(BadSampleError, match=message):
        EditDecoder()(members | sources, 0, (16, 16), (40, 30))


def test_pairs_in_batches(
    tmp_path: Path, members: dict[str, bytes], write_tar: WriteTar, sd_module: LoraDiffusion
) -> None:
    """A bad source costs its sample alone, a missing one is found at the start, and other families refuse pairs."""
    names = {f"{key}.{name}": data for key in "abc" for name, data in members.items()}
    write_tar(tmp_path / "shards" / "a.tar", {**names, "b.source.png": b"no image"})
    options: dict[str, Any] = {"batch_size": 3, "resolution": 16, "num_workers": 0, "max_bad_samples": 1}
    data = WebDatasetDataModule(str(tmp_path / "shards"), decoder=EditDecoder(), **options)
    data.setup("fit")
    with pytest.warns(UserWarning, match="source image: the image's header cannot be read"):
        (batch,) = data.train_dataloader()
    assert batch["source_pixel_values"].shape == (3, 3, 16, 16)
    assert sorted(batch["weight"].tolist()) == [0, 1, 1]
    blank = EditDecoder().blank((16, 16))
    assert {name: getattr(value, "shape", None) for name, value in blank.items()}.keys() <= batch.keys()

    del names["c.source.png"]
    write_tar(tmp_path / "missing" / "a.tar", names)
    lacking = WebDatasetDataModule(str(tmp_path / "missing"), decoder=EditDecoder(), **options)
    with pytest.raises(UserError, match=r"1 of 3 samples have no source image .* first c;"):
        lacking.setup("fit")

    sets = [ShardSet(str(tmp_path / "shards"), decoder=EditDecoder()), ShardSet(str(tmp_path / "missing"))]
    with pytest.raises(UserError, match="cannot be in one batch: source_pixel_values is"):
        WebDatasetDataModule(train_sets=sets, **options).setup("fit")

    sd_module._trainer = trainer = type("Trainer", (), {"datamodule": data, "training": True})()  # type: ignore[assignment]
    sd_module.family.read_configs()
    with pytest.raises(UserError, match="decoder EditDecoder gives editing pairs, and StableDiffusion trains text to"):
        check_data(sd_module)
    assert trainer.datamodule is data
