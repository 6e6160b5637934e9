"""Masks that follow their images through crops, flips and buckets."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.datamodules.decoding.image_decoder import ImageDecoder
from lit_lora.datamodules.decoding.mask import decode_mask
from lit_lora.errors import UserError

SIZE = (40, 30)
PIXELS = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
RED = PIXELS[..., 0]


def png(pixels: np.ndarray, mode: str | None = None, format: str = "PNG", **options: object) -> bytes:  # noqa: A002
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, format, **options)
    return buffer.getvalue()


WITH_ALPHA = np.dstack([PIXELS, RED])
SAMPLES = {
    "mask.png": {"png": png(PIXELS), "mask.png": png(RED), "txt": b"a"},
    "alpha": {"png": png(WITH_ALPHA), "txt": b"a"},
}
"""The mask of each is the red channel of its image."""


@pytest.mark.parametrize("source", SAMPLES)
@pytest.mark.parametrize("size", [(16, 16), (12, 20), (20, 12)])
def test_mask_is_framed_like_its_image(source, size):
    decoder = ImageDecoder(random_flip=True, mask=source).with_seed(1)
    seen = set()
    for slot in range(12):
        entries = decoder(SAMPLES[source], slot, size, SIZE)
        assert torch.equal(entries["loss_mask"], entries["pixel_values"][:1])
        assert entries["loss_mask"].dtype == torch.uint8
        seen.add((entries["crop_top_left"], decoder.framing.flips(slot)))
    assert len(seen) > 4
    assert decoder.blank(size)["loss_mask"].shape == (1, *size)
    plain = ImageDecoder(random_flip=True).with_seed(1)(SAMPLES[source], 3, size, SIZE)
    assert torch.equal(plain["pixel_values"], decoder(SAMPLES[source], 3, size, SIZE)["pixel_values"])


@pytest.mark.parametrize("value", [0, 1])
def test_a_mask_of_nothing_is_a_bad_sample(value):
    flat = np.full_like(RED, value)
    samples = {
        "mask.png": {**SAMPLES["mask.png"], "mask.png": png(flat)},
        "alpha": {"png": png(np.dstack([PIXELS, flat])), "txt": b"a"},
    }
    for source, members in samples.items():
        with pytest.raises(BadSampleError, match=f"largest value in the mask is {value}, .* 255 .white"):
            decode_mask(members, source, SIZE)
    flat[3, 4] = 2
    assert decode_mask({**samples["mask.png"], "mask.png": png(flat)}, "mask.png", SIZE).sum() == 2 + value * (
        flat.size - 1
    )


def test_evaluation_has_no_masks():
    decoder = ImageDecoder(mask="mask.png")
    assert decoder.required["mask"] == ("mask.png",)
    assert "mask" not in decoder.for_evaluation().required
    assert "loss_mask" not in decoder.for_evaluation()(SAMPLES["alpha"], 0, (16, 16), SIZE)


def test_images_without_alpha_count_entirely():
    for image in (png(PIXELS), png(PIXELS, format="JPEG")):
        name = "png" if image.startswith(b"\x89PNG") else "jpg"
        mask = decode_mask({name: image}, "alpha", SIZE)
        assert mask.shape == (1, SIZE[1], SIZE[0])
        assert mask.min() == 255


def test_alpha_of_other_files():
    webp = decode_mask({"webp": png(WITH_ALPHA, format="WEBP", lossless=True, exact=True)}, "alpha", SIZE)
    assert np.array_equal(webp[0], RED)
    palette = png((RED > 99).astype(np.uint8), "P", transparency=0)
    assert set(decode_mask({"png": palette}, "alpha", SIZE).unique().tolist()) == {0, 255}
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = decode_mask({"png": png(WITH_ALPHA, exif=exif)}, "alpha", (SIZE[1], SIZE[0]))
    assert np.array_equal(turned[0], np.rot90(RED, -1))


def test_masks_that_cannot_be_used():
    image = png(PIXELS)
    for members, message in (
        ({"png": image}, r"there is no .mask.png member"),
        ({"png": image, "mask.png": png(RED[:20])}, "the mask has 40 x 20 pixels, and the image 40 x 30"),
        ({"png": image, "mask.png": b"no image"}, "the mask's header cannot be read"),
        ({"png": image, "mask.png": png(RED)[:200]}, "cannot be decoded"),
    ):
        with pytest.raises(BadSampleError, match=message):
            decode_mask(members, "mask.png", SIZE)
    with pytest.raises(BadSampleError, match="the image cannot be decoded"):
        decode_mask({"png": png(WITH_ALPHA)[:200]}, "alpha", SIZE)


def test_every_training_sample_needs_its_mask(tmp_path, write_tar):
    from lit_lora.datamodules import WebDatasetDataModule

    members = {f"{key}.{name}": data for key in "ab" for name, data in SAMPLES["mask.png"].items()}
    options = {"resolution": 16, "num_workers": 0, "decoder": ImageDecoder(mask="mask.png")}
    val = write_tar(tmp_path / "val" / "v.tar", {"c.png": png(PIXELS), "c.txt": b"c"})  # validation needs none
    train = write_tar(tmp_path / "train" / "a.tar", members)
    data = WebDatasetDataModule(str(train), str(val), **options)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch["loss_mask"], batch["pixel_values"][:, :1])
    assert "loss_mask" not in next(iter(data.val_dataloader()))
    del members["b.mask.png"]
    write_tar(tmp_path / "lacking" / "a.tar", members)
    with pytest.raises(UserError, match=r"1 of 2 samples have no mask \(.mask.png\); .* first b;"):
        WebDatasetDataModule(str(tmp_path / "lacking"), **options).setup("fit")
