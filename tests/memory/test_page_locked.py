"""Tensors side by side in page-locked memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from lit_lora.errors import UserError
from lit_lora.memory import page_locked as module
from lit_lora.memory.host_weights import HostWeights
from lit_lora.memory.page_locked import page_locked


class Memory:
    """Allocates ordinary memory and keeps the sizes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, size: int) -> Tensor:
        self.sizes.append(size)
        return torch.full((size,), 7, dtype=torch.uint8)


def test_copies_are_equal_and_apart() -> None:
    tensors = [
        torch.randn(3, 2),
        torch.randn(()),
        torch.empty(0),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(5, 3, dtype=torch.float64).t(),
        torch.tensor([True, False]),
        torch.randint(255, (700,), dtype=torch.uint8),
        torch.randn(300, dtype=torch.bfloat16),
    ]
    memory = Memory()
    copies = dict(page_locked(tensors, memory))
    assert sorted(copies) == list(range(len(tensors)))
    for index, tensor in enumerate(tensors):
        assert torch.equal(copies[index], tensor)
        assert copies[index].dtype == tensor.dtype
        assert copies[index].stride() == tensor.stride()
        assert copies[index].data_ptr() % tensor.element_size() == 0
    for index, copy in copies.items():  # no other copy changes with it
        copy.zero_()
        others = (other for other in copies if other > index)
        copies[index] = tensors[index] = torch.zeros(0)
        assert all(torch.equal(copies[other], tensors[other]) or copies[other].numel() == 0 for other in others)


def test_a_view_of_a_part_is_copied_without_the_rest() -> None:
    memory = Memory()
    whole = torch.randn(100, 100)
    ((_, copy),) = page_locked([whole[:, :3]], memory)
    assert torch.equal(copy, whole[:, :3])
    assert memory.sizes == [2048]


@pytest.mark.parametrize(
    "kib",
    [
        [18432] * 8 + [73728] * 4 + [110592] * 2,  # a double block of FLUX.1 in bfloat16
        [18432] * 3 + [92160, 73728, 55296],  # a single block
        [3200] * 8 + [25600, 12800],  # a transformer block of SDXL
        [32768] * 24 + [81920] * 18,  # six layers of T5-XXL
    ],
)
def test_pieces_are_powers_of_two_that_are_filled(kib: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGEST", module._LARGEST >> 10)  # a byte stands for a KiB
    sizes: list[int] = []
    tensors = [torch.empty(size, dtype=torch.uint8) for size in kib]
    list(page_locked(tensors, lambda size: sizes.append(size) or torch.empty(size, dtype=torch.uint8)))  # type: ignore[func-returns-value]
    assert all(size.bit_count() == 1 for size in sizes)
    assert sum(kib) <= sum(sizes) < 1.13 * sum(kib)
    assert sum(sizes) < sum(1 << (size - 1).bit_length() for size in kib)


def test_tensors_are_freed_one_by_one() -> None:
    left = []
    memory = Memory()
    tensors = [torch.ones(1000 + number) for number in range(4)]
    references = [weakref.ref(tensor) for tensor in tensors]
    copying = page_locked(tensors, memory)
    del tensors
    for _ in copying:
        left.append(sum(reference() is not None for reference in references))
    assert left == [3, 2, 1, 0]


def test_weights_are_page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    monkeypatch.setattr(module, "_allocate", memory)
    parameter = torch.nn.Parameter(torch.randn(3, 2).t(), requires_grad=False)
    buffer = torch.arange(4)
    expected = parameter.clone()
    weights = HostWeights([parameter, buffer])
    weights.pin()
    assert memory.sizes == [512]
    assert torch.equal(parameter, expected)
    assert parameter.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    pointer = parameter.data_ptr()
    weights.fetch(torch.device("cpu"))
    assert parameter.data_ptr() != pointer
    weights.drop()
    assert parameter.data_ptr() == pointer
    assert torch.equal(buffer, torch.arange(4))


def test_memory_that_cannot_be_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(size: int) -> Tensor:
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(module, "_allocate", refuse)
    with pytest.raises(
        UserError,
        match=r"page-locked for offloaded weights \(CUDA error: out of memory\); set memory.offload_folder, turn off",
    ):
        HostWeights([torch.ones(3)]).pin()
    with pytest.raises(UserError, match=r"out of memory\); draw on another device$"):
        HostWeights([torch.ones(3)]).pin("draw on another device")
