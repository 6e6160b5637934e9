from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lit_lora.datamodules.decoding.batch_builder import BatchBuilder


def _sample(number):
    """The tensor is a crop of an image that has its channels last in memory."""
    image = torch.arange(5 * 7 * 3).reshape(5, 7, 3).to(torch.uint8) + number
    return {
        "pixels": image.permute(2, 0, 1)[:, :, 1:5],
        "latents": torch.full((2, 3), float(number), dtype=torch.float16),
        "count": torch.tensor(number),
        "caption": f"number {number}",
        "text": {"hidden": torch.full((4,), float(number))},
    }


def _build(*places, size=3):
    builder = BatchBuilder(size)
    for place in places:
        builder.put(place, _sample(place))
    return builder


def test_samples_become_rows():
    builder = _build(2, 0, 1)
    batch = builder.finish()
    assert builder.places == [2, 0, 1]
    assert batch["caption"] == ["number 0", "number 1", "number 2"]
    for place in range(3):
        sample = _sample(place)
        assert torch.equal(batch["pixels"][place], sample["pixels"])
        assert torch.equal(batch["latents"][place], sample["latents"])
        assert torch.equal(batch["text"]["hidden"][place], sample["text"]["hidden"])
    assert batch["count"].tolist() == [0, 1, 2]
    assert (batch["pixels"].dtype, batch["latents"].dtype) == (torch.uint8, torch.float16)


def test_sample_in_the_lowest_row_fills_empty_rows():
    batch = _build(2, 1, size=4).finish()
    assert batch["count"].tolist() == [1, 1, 2, 1]
    assert batch["caption"] == ["number 1", "number 1", "number 2", "number 1"]
    assert batch["text"]["hidden"][:, 0].tolist() == [1, 1, 2, 1]
    assert torch.equal(batch["pixels"][0], batch["pixels"][1])


def test_layout_in_memory_is_that_of_the_samples():
    batch = _build(0, 1, 2).finish()
    assert batch["pixels"].shape == (3, 3, 5, 4)
    assert batch["pixels"].is_contiguous(memory_format=torch.channels_last)
    assert batch["latents"].is_contiguous()


@pytest.mark.parametrize("places", [(0, 1), (1, 0)])
def test_layout_is_that_of_the_lowest_row_whichever_comes_first(places):
    samples = [_sample(0)["pixels"], _sample(1)["pixels"].contiguous()]
    builder = BatchBuilder(2)
    for place in places:
        builder.put(place, {"pixels": samples[place]})
    batch = builder.finish()
    assert batch["pixels"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch["pixels"], torch.stack(samples))


def test_a_sample_may_change_after_it_was_put():
    builder, sample = BatchBuilder(1), _sample(0)
    builder.put(0, sample)
    expected = sample["pixels"].clone()
    sample["pixels"].zero_()
    assert torch.equal(builder.finish()["pixels"][0], expected)


def test_other_shapes_are_refused():
    builder = BatchBuilder(2)
    builder.put(0, {"text": torch.zeros(2, 3)})
    with pytest.raises(AssertionError, match=r"text: \(1, 3\) after \(2, 3\)"):
        builder.put(1, {"text": torch.zeros(1, 3)})


class Batches(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, number):
        batch = _build(0, 1, 2).finish()
        return batch | {"shared": batch["pixels"].is_shared()}


def test_batches_of_workers_are_built_in_shared_memory():
    (first, second) = DataLoader(Batches(), batch_size=None, num_workers=1, collate_fn=_same)
    assert first["shared"]
    assert first["count"].tolist() == second["count"].tolist() == [0, 1, 2]
    assert torch.equal(first["pixels"][1], _sample(1)["pixels"])
    assert first["pixels"].is_contiguous(memory_format=torch.channels_last)


def _same(batch):
    return batch


def _large(value):
    builder = BatchBuilder(2)
    for place in range(2):
        builder.put(place, {"pixels": torch.full((3, 300, 300), value, dtype=torch.uint8)})
    return builder.finish()["pixels"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="pinned memory has an allocator of its own")
def test_memory_is_reused_when_the_batch_has_been_freed():
    first = _large(1)
    address, part = first.data_ptr(), first[0, 0]
    assert _large(2).data_ptr() != address
    del first
    second = _large(3)
    assert second.data_ptr() != address
    assert (part == 1).all()
    as_array = second.numpy()
    del second, part
    third = _large(4)
    assert third.data_ptr() == address
    assert (as_array == 3).all()
    assert (third == 4).all()


def test_memory_of_batches_of_other_sizes_is_freed():
    from lit_lora.datamodules.decoding.batch_builder import _MEMORY

    for height in range(300, 900, 100):
        builder = BatchBuilder(1)
        builder.put(0, {"pixels": torch.zeros(3, height, 400, dtype=torch.uint8)})
        builder.finish()
    assert sum(array.nbytes for array in _MEMORY._arrays) <= 2 * 3 * 900 * 400
