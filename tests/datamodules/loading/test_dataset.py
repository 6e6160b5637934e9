from __future__ import annotations

import io
import os
import tarfile

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
from lit_lora.errors import UserError

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


def _replace(path, data):
    """Replace the content of a file and keep its size and times."""
    before = path.stat()
    assert len(data) == before.st_size
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("how", ["keys", "sizes", "order"])
def test_shard_that_was_replaced(tmp_path, make_shards, write_tar, encode_image, dataset_of, how):
    (path,) = make_shards(2)
    dataset = dataset_of([path])
    members = {}
    for number in range(2):
        name = f"{number + (1 if how == 'keys' else 0):04}"
        text = f"caption {number:04}" if how == "sizes" else f"caption {number:04}\n"
        parts = [(f"{name}.jpg", encode_image(seed=number)), (f"{name}.txt", text.encode())]
        members |= dict(parts[::-1] if how == "order" else parts)
    _replace(path, write_tar(tmp_path / "other.tar", members).read_bytes())
    with pytest.raises(
        UserError, match=rf"{path} is not the shard that was indexed: at byte \d+ there is another member"
    ):
        dataset.__getitems__(_requests(0, 1))


def test_shard_that_changes_in_place_while_it_is_read(make_shards, dataset_of):
    (path,) = make_shards(2)
    dataset = dataset_of([path])
    assert dataset.__getitems__(_requests(0))["caption"] == ["caption 0000"]
    _replace(path, path.read_bytes().replace(b"caption 0001", b"caption 0009"))
    os.utime(path, ns=(0, 1))
    with pytest.warns(UserWarning, match=f"{path} was changed while it was in use"):
        assert dataset.__getitems__(_requests(1))["caption"] == ["caption 0009"]
    assert dataset.__getitems__(_requests(1))["bad"] == []


def test_size_in_the_index_must_be_that_of_the_image(make_shards, dataset_of):
    dataset = dataset_of(make_shards(2))
    dataset.reader.table._indexes[0]._rows(0)["width"][1] = 16
    (report,) = dataset.__getitems__(_requests(0, 1))["bad"]
    assert report.reason == "the image has 24 x 16 pixels, but 16 x 16 in the index"


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("key", ["ü", "./a", "A", "folder/" * 20 + "a", "k" * 95, "k" * 99, "k" * 150])
def test_headers_of_all_kinds_are_recognised(tmp_path, encode_image, dataset_of, kind, key):
    if kind == tarfile.USTAR_FORMAT and len(key) > 96 and "/" not in key:
        pytest.skip("ustar cannot hold it")
    with tarfile.open(tmp_path / "x.tar", "w", format=kind) as archive:
        for extension, data in {"JPG": encode_image(), "txt": b"x"}.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    batch = dataset_of([tmp_path / "x.tar"]).__getitems__(_requests(0))
    assert batch["bad"] == []
    assert batch["key"] == [key]


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
