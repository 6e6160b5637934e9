from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.datamodules.decoding.framing import Framing


def _image(height, width):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _resized(image, resolution):
    return v2.Resize(resolution, v2.InterpolationMode.BICUBIC, antialias=True)(image)


@given(st.integers(1, 60), st.integers(1, 60), st.booleans(), st.booleans(), st.integers(0, 10**12))
def test_square_and_numbers_agree(height, width, center_crop, random_flip, slot):
    image = _image(height, width)
    pixels, original_size, (top, left) = Framing(center_crop, random_flip, seed=1)(image, slot, (16, 16))

    assert original_size == (height, width)
    resized = _resized(image, 16)
    crops = [x[:, top : top + 16, left : left + 16] for x in (resized, F.horizontal_flip(resized))]
    assert pixels.shape == (3, 16, 16)
    assert any(torch.equal(pixels, crop) for crop in crops[: 2 if random_flip else 1])


@pytest.mark.parametrize(("height", "width"), [(40, 61), (61, 40), (33, 33), (16, 19)])
def test_centre_crop_is_torchvisions(height, width):
    image = _image(height, width)
    framed = Framing(center_crop=True, random_flip=False, seed=1)(image, 5, (16, 16))
    assert torch.equal(framed.pixels, v2.CenterCrop(16)(_resized(image, 16)))


def test_choices_depend_on_seed_and_slot_only():
    image = _image(20, 90)

    def choices(seed, slots):
        framing = Framing(center_crop=False, random_flip=True, seed=seed)
        return {slot: framing(image, slot, (16, 16)) for slot in slots}

    one, other, seeded = choices(0, range(60)), choices(0, range(59, -1, -1)), choices(1, range(60))
    assert all(torch.equal(one[slot].pixels, other[slot].pixels) for slot in one)
    assert len({framed.crop_top_left for framed in one.values()}) > 20
    assert [f.crop_top_left for f in one.values()] != [f.crop_top_left for f in seeded.values()]


def test_half_of_the_images_are_mirrored():
    image = _image(16, 16)
    framing = Framing(center_crop=True, random_flip=True, seed=0)
    mirrored = sum(not torch.equal(framing(image, slot, (16, 16)).pixels, image) for slot in range(200))
    assert 70 < mirrored < 130


def test_mirroring_does_not_move_the_crop():
    image = _image(16, 60)
    plain = Framing(center_crop=False, random_flip=False, seed=0)
    mirrored = Framing(center_crop=False, random_flip=True, seed=0)
    assert all(
        plain(image, slot, (16, 16)).crop_top_left == mirrored(image, slot, (16, 16)).crop_top_left
        for slot in range(20)
    )


def test_narrow_image_is_refused_before_it_is_resized():
    with pytest.raises(BadSampleError, match="1000000 x 1 pixels is too narrow"):
        Framing(True, False, 0)(torch.zeros(3, 1, 1_000_000, dtype=torch.uint8), 0, (512, 512))


@given(*[st.integers(1, 60)] * 2, *[st.integers(8, 32)] * 2, st.integers(0, 10**12))
def test_any_size_is_covered_without_distortion(height, width, target_height, target_width, slot):
    framing = Framing(center_crop=False, random_flip=False, seed=1)
    pixels, _, (top, left) = framing(_image(height, width), slot, (target_height, target_width))

    assert pixels.shape == (3, target_height, target_width)
    scale = max(target_height / height, target_width / width)
    assert 0 <= top <= height * scale - target_height + 1e-6
    assert 0 <= left <= width * scale - target_width + 1e-6
