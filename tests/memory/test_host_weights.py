"""Tensors in host memory with copies elsewhere."""

from __future__ import annotations

import pytest
import torch

from lit_lora.distributed import LitLoraFSDP
from lit_lora.errors import UserError
from lit_lora.memory.host_weights import HostWeights, check_offload, target_of

CPU = torch.device("cpu")


def test_copies_come_and_go() -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 2).t(), requires_grad=False)
    buffer = torch.arange(4)
    weights = HostWeights([parameter, buffer, parameter])
    assert weights.nbytes == parameter.nbytes + buffer.nbytes
    pointers, expected = [parameter.data_ptr(), buffer.data_ptr()], parameter.clone()
    weights.fetch(CPU)
    there = [parameter.data_ptr(), buffer.data_ptr()]
    assert weights.is_on_device
    assert not set(there) & set(pointers)
    assert torch.equal(parameter, expected)
    assert parameter.stride() == (1, 2)
    weights.fetch(CPU)
    weights.wait()
    assert [parameter.data_ptr(), buffer.data_ptr()] == there
    weights.drop()
    weights.drop()
    assert not weights.is_on_device
    assert [parameter.data_ptr(), buffer.data_ptr()] == pointers


def test_what_is_fetched_while_validating_can_be_trained_with() -> None:
    parameter = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    weights = HostWeights([parameter])
    with torch.inference_mode():
        weights.fetch(CPU)
    x = torch.ones(2, requires_grad=True)
    (x * parameter).sum().backward()
    with torch.inference_mode():
        weights.drop()
    (x * parameter).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 2.0))  # type: ignore[arg-type]


def test_where_a_move_leads() -> None:
    assert target_of(lambda tensor: tensor.to("meta"), CPU) == torch.device("meta")
    assert target_of(lambda tensor: tensor.half(), torch.device("meta")) == torch.device("meta")


@pytest.mark.parametrize(
    ("device", "strategy", "message"),
    [
        ("cpu", None, "offload_blocks moves memory from a GPU to the host, .* set offload_blocks to false"),
        ("mps", None, "offload_blocks supports CUDA devices only, not 'mps'"),
        (
            "cuda",
            LitLoraFSDP(),
            "offload_blocks cannot be combined with LitLoraFSDP; set offload_blocks to false and the strategy's",
        ),
    ],
)
def test_devices_that_gain_nothing(device: str, strategy: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_offload("offload_blocks", torch.device(device), strategy)


def test_devices_that_do() -> None:
    check_offload("offload_blocks", torch.device("cuda", 1))
