from __future__ import annotations

import io

import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from lit_lora.datamodules.decoding.captions import Captions
from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.datamodules.decoding.edit_decoder import EditDecoder
from lit_lora.datamodules.decoding.image_decoder import ImageDecoder
from lit_lora.datamodules.decoding.sample_decoder import SampleDecoder
from lit_lora.errors import UserError


class TakesDecoder:
    def __init__(self, decoder: SampleDecoder = ImageDecoder()) -> None:  # noqa: B008 it is frozen
        self.decoder = decoder


def _decode(decoder, encode_image, slot=3):
    members = {"png": encode_image(40, 30, "PNG"), "txt": b"red, blue, green, white, black"}
    return decoder(members, slot, (16, 16), (40, 30))


def test_entries_have_the_planned_size(encode_image):
    entries = _decode(ImageDecoder(), encode_image)
    assert entries["pixel_values"].shape == (3, 16, 16)
    assert entries["target_size"] == (16, 16)
    assert entries["original_size"] == (30, 40)
    blank = ImageDecoder().blank((16, 16))
    assert blank.keys() == entries.keys()
    assert blank["pixel_values"].shape == (3, 16, 16)


def test_draws_are_of_seed_and_slot(encode_image):
    decoder = ImageDecoder(random_flip=True, captions=Captions(shuffle_tags=True))

    def seen(seed, slot):
        entries = _decode(decoder.with_seed(seed), encode_image, slot)
        return entries["caption"], entries["crop_top_left"], entries["pixel_values"].tolist()

    assert seen(1, 5) == seen(1, 5)
    assert seen(1, 5) != seen(2, 5)
    assert seen(1, 5) != seen(1, 6)


def test_evaluation_crops_the_middle_and_does_not_flip(encode_image):
    decoder = ImageDecoder(random_flip=True).with_seed(1).for_evaluation()
    entries = [_decode(decoder, encode_image, slot) for slot in range(8)]
    assert all(torch.equal(one["pixel_values"], entries[0]["pixel_values"]) for one in entries)
    assert entries[0]["crop_top_left"] == (0, 2)


def _transparent(size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGBA", size).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("decoder", [ImageDecoder, EditDecoder])
def test_a_color_is_put_behind_transparent_parts(decoder):
    members = {"png": _transparent(), "txt": b"a", "source.png": _transparent()}
    plain, white = (decoder(background=one)(members, 0, (16, 16), (40, 30)) for one in (None, "white"))
    names = [name for name in plain if name.endswith("pixel_values")]
    assert len(names) == 1 + decoder.pairs
    for name in names:
        assert plain[name].unique().tolist() == [0]
        assert white[name].unique().tolist() == [255]
    assert decoder(background="white").for_evaluation().background == "white"


def test_a_background_that_is_no_color():
    with pytest.raises(UserError, match="background='whit' is no color; give a name such as white, or #rrggbb"):
        ImageDecoder(background="whit")


def test_options_are_the_public_ones():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TakesDecoder, "data")
    config = parser.parse_string("data: {decoder: {random_flip: true, captions: {dropout: 0.1}}}")
    again = parser.instantiate_classes(parser.parse_string(parser.dump(config))).data.decoder
    assert again == ImageDecoder(random_flip=True, captions=Captions(dropout=0.1))
    for mistake in ("random_flop: true", "_seed: 3"):
        with pytest.raises(Exception, match=mistake.partition(":")[0]):
            parser.parse_string(f"data: {{decoder: {{{mistake}}}}}")


@pytest.mark.parametrize(
    ("members", "size", "message"),
    [
        ({"txt": b"a"}, (40, 30), "there is no image"),
        ({"png": True, "txt": b"a"}, (30, 40), "the image has 40 x 30 pixels, but 30 x 40 in the index"),
        ({"png": b"no image", "txt": b"a"}, (40, 30), "the image's header cannot be read"),
    ],
)
def test_image_that_is_not_the_indexed_one(encode_image, members, size, message):
    members = {name: encode_image(40, 30, "PNG") if data is True else data for name, data in members.items()}
    with pytest.raises(BadSampleError, match=message):
        ImageDecoder()(members, 0, (16, 16), size)


def test_bomb_behind_a_small_size_in_the_index(encode_image):
    data = bytearray(encode_image(40, 30))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(BadSampleError, match="has 65535 x 65535 pixels, more than"):
        ImageDecoder()({"jpg": bytes(data), "txt": b"a"}, 0, (16, 16), (40, 30))
