from __future__ import annotations

import pytest
import torch

from lit_lora.datamodules.decoding.captions import Captions, CaptionSource
from lit_lora.datamodules.decoding.decode import decode_rgb
from lit_lora.datamodules.decoding.framing import Framing
from lit_lora.datamodules.decoding.image_decoder import ImageDecoder
from lit_lora.datamodules.indexing.index import ShardIndex
from lit_lora.datamodules.indexing.table import SampleTable
from lit_lora.datamodules.loading.dataset import ShardDataset, SlotRequest
from lit_lora.datamodules.loading.shard_reader import ShardReader

FRAMING = Framing(center_crop=False, random_flip=True, seed=3)
SIZE = (8, 12)


@pytest.fixture
def dataset_of():
    def make(paths, captions=None):
        table = SampleTable.of([ShardIndex.build(path) for path in paths])
        return ShardDataset(
            ShardReader(table), ImageDecoder(random_flip=True, captions=captions or Captions()).with_seed(3)
        )

    return make


def _requests(*samples, first_slot=0):
    return [SlotRequest(sample, 1.0, first_slot + place, SIZE) for place, sample in enumerate(samples)]


def test_batch_contract(make_shards, dataset_of, encode_image):
    batch = dataset_of(make_shards(2, 3)).__getitems__(_requests(4, 0, 3, first_slot=70))

    assert set(batch) == {
        "pixel_values", "caption", "original_size", "crop_top_left", "target_size", "weight", "slot", "key", "bad",
    }  # fmt: skip
    assert batch["key"] == ["0004", "0000", "0003"]
    assert batch["caption"] == ["caption 0004", "caption 0000", "caption 0003"]
    assert batch["pixel_values"].shape == (3, 3, 8, 12)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["original_size"].tolist() == [[16, 24]] * 3
    assert batch["target_size"].tolist() == [[8, 12]] * 3
    assert batch["original_size"].dtype == batch["target_size"].dtype == batch["crop_top_left"].dtype == torch.int64
    assert batch["weight"].dtype == torch.float32
    assert batch["weight"].tolist() == [1.0] * 3
    assert batch["slot"] == [70, 71, 72]
    assert batch["bad"] == []
    for place, number in enumerate((4, 0, 3)):
        framed = FRAMING(decode_rgb(encode_image(seed=number)), 70 + place, SIZE)
        assert torch.equal(batch["pixel_values"][place], framed.pixels)
        assert batch["crop_top_left"][place].tolist() == list(framed.crop_top_left)


def test_only_needed_members_are_read(tmp_path, write_tar, encode_image, dataset_of):
    members = {"a.jpg": encode_image(), "a.json": b'{"caption": "json"}', "a.txt": b"txt"}
    dataset = dataset_of([write_tar(tmp_path / "x.tar", members)], Captions([CaptionSource("json")]))
    assert dataset.__getitems__(_requests(0))["caption"] == ["json"]
    assert set(dataset.reader.read(0, dataset.decoder.extensions)) == {"jpg", "json"}


def test_bad_samples_are_replaced(tmp_path, write_tar, encode_image, dataset_of):
    good = encode_image()
    members = {
        "a.jpg": good[:-50], "a.txt": b"a", "b.jpg": good, "b.txt": b"b", "c.jpg": good, "c.txt": b"caf\xe9",
        "d.jpg": b"nothing", "d.txt": b"d", "e.jpg": good, "e.json": b"{}",
    }  # fmt: skip
    path = write_tar(tmp_path / "x.tar", members)
    batch = dataset_of([path]).__getitems__(_requests(0, 1, 2, 3, 4))

    assert batch["weight"].tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert batch["key"] == ["b"] * 5
    assert batch["slot"] == [0, 1, 2, 3, 4]
    assert all(torch.equal(pixels, batch["pixel_values"][1]) for pixels in batch["pixel_values"])
    assert [(report.shard, report.key) for report in batch["bad"]] == [(str(path), key) for key in "acde"]
    reasons = [report.reason for report in batch["bad"]]
    for reason, expected in zip(
        reasons, ("cannot be decoded", "not UTF-8", "header", "no text in .txt or under"), strict=True
    ):
        assert expected in reason


def test_batch_of_bad_samples_alone(tmp_path, write_tar, dataset_of):
    path = write_tar(tmp_path / "x.tar", {"a.jpg": b"nothing", "a.txt": b"a"})
    batch = dataset_of([path]).__getitems__(_requests(0, 0))

    assert batch["weight"].tolist() == [0.0, 0.0]
    assert batch["pixel_values"].shape == (2, 3, 8, 12)
    assert not batch["pixel_values"].any()


def test_padding_keeps_its_weight(make_shards, dataset_of):
    batch = dataset_of(make_shards(2)).__getitems__([SlotRequest(0, 1.0, 0, SIZE), SlotRequest(1, 0.0, 1, SIZE)])
    assert batch["weight"].tolist() == [1.0, 0.0]


def test_shard_that_vanishes_or_shrinks(make_shards, dataset_of):
    first, second = make_shards(1, 1)
    dataset = dataset_of([first, second])
    first.unlink()
    second.write_bytes(second.read_bytes()[:700])

    reasons = [report.reason for report in dataset.__getitems__(_requests(0, 1))["bad"]]
    assert reasons == [
        "cannot read the shard (No such file or directory)",
        "the shard is shorter than when it was indexed",
    ]
