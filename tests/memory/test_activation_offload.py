"""Saved activations in host memory: which go, which stay, and the same gradients."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_lora.memory.activation_offload import ActivationOffload
from lit_lora.memory.checkpointing import enable_gradient_checkpointing
from tests.memory.test_checkpointing import adapted, unet


def gradients(model: nn.Module, inputs: dict[str, Any], offload: ActivationOffload | None) -> list[Tensor]:
    model.zero_grad()
    if offload is None:
        loss = model(**inputs).sample.square().mean()
    else:
        with offload:
            loss = model(**inputs).sample.square().mean()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_same_gradients_in_several_steps(checkpointing: bool) -> None:
    model, inputs = unet()
    model = adapted(model)
    expected = gradients(model, inputs, None)
    enable_gradient_checkpointing(model, checkpointing)
    offload = ActivationOffload(pin_memory=False, smallest_bytes=1024)
    moved = []
    for _ in range(2):
        before = offload.bytes_moved
        for mine, theirs in zip(gradients(model, inputs, offload), expected, strict=True):
            # What comes back of a slice is contiguous, which other kernels add up in another order.
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)
        moved.append(offload.bytes_moved - before)
    assert moved[0] == moved[1] > 0


def test_with_checkpointing_the_inputs_of_blocks_go() -> None:
    moved = []
    for checkpointing in (False, True):
        model, inputs = unet()
        enable_gradient_checkpointing(model, checkpointing)
        offload = ActivationOffload(pin_memory=False, smallest_bytes=1)
        gradients(adapted(model), inputs, offload)
        moved.append(offload.bytes_moved)
    assert 0 < moved[1] < moved[0] / 3


def test_parameters_and_small_tensors_stay() -> None:
    linear, norm = nn.Linear(8, 8), nn.LayerNorm(8, bias=False)
    norm.requires_grad_(False)
    x = torch.randn(4, 8, requires_grad=True)
    offload = ActivationOffload(pin_memory=False, smallest_bytes=128)
    with offload:
        # Saves x, mean and deviation of each row, and three parameters, one of them transposed.
        loss = torch.sigmoid(norm(x) @ linear.weight.t()).sum()
    assert offload.bytes_moved == 3 * x.nbytes  # x, the input of the product, the output of sigmoid
    loss.backward()
    linear.zero_grad()
    with ActivationOffload(pin_memory=False, smallest_bytes=129) as nothing:
        assert nothing is None
        torch.sigmoid(norm(x) @ linear.weight.t()).sum().backward()


def test_what_goes_is_let_go() -> None:
    """Neither a tensor that went to the host nor one that stays is kept alive by it."""
    for smallest_bytes in (1, 1 << 20):
        offload = ActivationOffload(pin_memory=False, smallest_bytes=smallest_bytes)
        with offload:
            middle = (torch.randn(64, requires_grad=True) * 2).exp()  # saves its own output
            loss = middle.sum()
        storage = weakref.ref(middle.untyped_storage())
        tensor = weakref.ref(middle)
        del middle
        assert tensor() is None
        del loss
        gc.collect()
        assert storage() is None


def test_what_goes_comes_back_in_its_shape_and_dtype() -> None:
    offload = ActivationOffload(pin_memory=False, smallest_bytes=1)
    for tensor in (
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(6, 4).t(),
        torch.randn(1, 5).expand(4, 5),
        torch.randn(3, 3).bfloat16(),
        torch.arange(5),
        torch.tensor(1.5),
    ):
        back = offload._unpack(offload._pack(tensor))
        assert torch.equal(back, tensor)
        assert back.dtype == tensor.dtype
        if tensor.numel() == tensor.untyped_storage().nbytes() // tensor.itemsize:
            assert back.stride() == tensor.stride()
