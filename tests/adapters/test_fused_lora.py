from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_lora.adapters import inject
from lit_lora.adapters.fused_lora import FusedLoraLinear, fuse
from lit_lora.quantization import NF4, W8A8, Dense, Int8, Quantization
from lit_lora.quantization.frozen_layer import freeze_layer


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(64, 32)
        self.to_k = nn.Linear(64, 32, bias=False)
        self.trained = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.trained(self.to_q(x) * self.to_k(x))
        return rows


def models(
    quantization: Quantization, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """Two equal models with adapters that have values, the second with fused layers."""
    torch.manual_seed(0)
    model = Layers().to(dtype)
    for layer in (model.to_q, model.to_k):
        freeze_layer(layer, quantization, layer.weight, dtype)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_k", "trained"], init_lora_weights=False, **options
    )
    plain = inject(model, config, ())
    fused = copy.deepcopy(plain)
    assert fuse(fused) == 3
    return plain, fused


def values(model: nn.Module, dtype: torch.dtype, checkpointed: bool = False) -> list[Tensor]:
    """Output, gradient of the input, and gradients of the adapter."""
    torch.manual_seed(1)
    x = torch.randn(2, 5, 64).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        inner = x * 1  # as in a denoiser: autocast would share its cast of a leaf
        out = checkpoint(model, inner, use_reentrant=False) if checkpointed else model(inner)
    out.float().square().mean().backward()
    trained = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert x.grad is not None
    return [out.detach(), x.grad, *(gradient for gradient in trained if gradient is not None)]


@pytest.mark.parametrize("quantization", [Dense(), Int8(), W8A8(), NF4(block_size=32)])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_results_are_those_of_peft(quantization: Quantization, checkpointed: bool) -> None:
    plain, fused = models(quantization)
    expected, found = values(plain, torch.float32), values(fused, torch.float32, checkpointed)
    # A gradient that differs in its last bit may be rounded to the next of 255 integers.
    bounds = {"rtol": 2e-2, "atol": 2e-3} if isinstance(quantization, W8A8) else {"rtol": 1e-5, "atol": 1e-6}
    assert len(found) == len(expected) == 8
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **bounds)


def test_in_bfloat16_it_is_nearer_to_float32_than_peft() -> None:
    exact, _ = models(Dense(), torch.float32)
    plain, fused = models(Dense(), torch.bfloat16)
    for model in (plain, fused):  # the same values as in float32, as far as bfloat16 holds them
        for parameter, value in zip(model.parameters(), exact.parameters(), strict=True):
            parameter.data = value.data.to(parameter.dtype)
            value.data = parameter.data.float()
    right = values(exact, torch.float32)

    def error(model: nn.Module) -> float:
        found = values(model, torch.bfloat16)
        return sum(float((ours - one).norm() / one.norm()) for ours, one in zip(found, right, strict=True))

    assert error(fused) <= error(plain) * 1.02


def test_fewer_operations_and_less_memory() -> None:
    counts: list[tuple[int, int]] = []
    for model in models(Dense(), torch.bfloat16):
        saved: dict[int, int] = {}

        def note(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with (
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler,
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            values(model, torch.bfloat16)
        counts.append((sum(event.count for event in profiler.key_averages()), sum(saved.values())))
    (plain_calls, plain_bytes), (calls, nbytes) = counts
    assert calls < 0.85 * plain_calls
    # Two float32 products with 2 x 5 rows need one bfloat16 copy of their input, not two.
    assert nbytes <= plain_bytes - 2 * 5 * 64 * 2


def test_an_input_that_changes_in_place_is_cast_anew() -> None:
    _, fused = models(Dense(), torch.bfloat16)
    layer: Any = fused.get_submodule("base_model.model.to_q")
    x = torch.randn(2, 5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        first = layer(x)
        x.mul_(2)
        found, expected = layer(x), layer(x.clone())
    assert torch.equal(found, expected)
    assert not torch.equal(found, first)


@pytest.mark.parametrize("case", ["dropout", "hook", "disabled", "dora"])
def test_other_calls_are_those_of_peft(case: str) -> None:
    options: dict[str, Any] = {"dropout": {"lora_dropout": 0.5}, "dora": {"use_dora": True}}.get(case, {})
    plain, fused = models(Dense(), **options)
    seen: list[object] = []
    for model in (plain, fused):
        layer: Any = model.get_submodule("base_model.model.to_q")
        if case == "hook":
            layer.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
        if case == "disabled":
            layer.enable_adapters(False)
    expected, found = values(plain, torch.float32), values(fused, torch.float32)
    assert len(seen) == (2 if case == "hook" else 0)
    assert any(isinstance(layer, FusedLoraLinear) for layer in fused.modules())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
