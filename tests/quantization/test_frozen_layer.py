"""Frozen layers: values and gradients of torch's own, less memory between the passes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_lora.quantization import FP8, NF4, Dense, Int8, Quantization
from lit_lora.quantization.frozen_layer import FrozenLayer, can_freeze, freeze_layer
from tests.helpers import freeze_remaining

LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(12, 8), (2, 5, 12)),
    (nn.Linear(12, 8, bias=False), (3, 12)),
    (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 8)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 9, 9)),
    (nn.Conv2d(4, 6, 1), (1, 4, 5, 5)),
    (nn.Conv2d(4, 8, 3, groups=2, dilation=2), (1, 4, 8, 8)),
]
QUANTIZATIONS: list[Quantization] = [Dense(), Int8(), FP8(), NF4()]


def _frozen(layer: nn.Module, quantization: Quantization) -> FrozenLayer:
    frozen = copy.deepcopy(layer).requires_grad_(False)
    weight = frozen.weight
    assert isinstance(weight, Tensor)
    freeze_layer(frozen, quantization, weight.detach(), weight.dtype)
    assert isinstance(frozen, FrozenLayer)
    return frozen


def _reference(frozen: FrozenLayer, layer: nn.Module) -> nn.Module:
    """Torch's layer with the weight that the quantization gives back."""
    reference = copy.deepcopy(layer).requires_grad_(False)
    assert isinstance(reference.weight, Tensor)
    reference.weight.copy_(frozen.weight)
    return reference


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("case", LAYERS, ids=lambda c: str(c[0]))
def test_values_and_gradients_are_those_of_torch(case: Any, quantization: Quantization) -> None:
    layer, shape = case
    frozen = _frozen(layer, quantization)
    reference = _reference(frozen, layer)
    x, y = (torch.randn(shape).requires_grad_() for _ in range(2))
    y.data.copy_(x)
    mine, theirs = frozen(x), reference(y)
    assert torch.equal(mine, theirs)
    grad = torch.randn_like(mine)
    mine.backward(grad)
    theirs.backward(grad)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("case", LAYERS[:3], ids=lambda c: str(c[0]))
def test_under_autocast(case: Any, quantization: Quantization) -> None:
    layer, shape = case
    frozen = _frozen(layer, quantization)
    x = torch.randn(shape).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = frozen(x)
        expected = _reference(frozen, layer)(x)
    assert out.dtype == torch.bfloat16
    # The weight comes back in bfloat16 at once; the reference rounds it twice.
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    out.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=lambda s: type(s).__name__)
def test_nothing_is_saved_for_the_backward_pass_but_stored_weights(quantization: Quantization) -> None:
    saved: list[int] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    for layer, shape in LAYERS:
        frozen = _frozen(layer, quantization)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            frozen(torch.randn(shape).requires_grad_())
        assert {*saved} <= {parameter.data_ptr() for parameter in frozen.parameters()}
        saved.clear()


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=lambda s: type(s).__name__)
def test_the_stored_tensors_may_move_between_the_passes(quantization: Quantization) -> None:
    layer, shape = LAYERS[2]
    frozen = _frozen(layer, quantization)
    x = torch.randn(shape).requires_grad_()
    expected = torch.autograd.grad(frozen(x).sum(), x)[0]
    out = frozen(x).sum()
    for name in frozen.stored_names:
        parameter = frozen.get_parameter(name)
        kept = parameter.data
        parameter.data = kept.clone()
        kept.zero_()
    assert torch.equal(torch.autograd.grad(out, x)[0], expected)


def test_a_trained_bias_gets_its_gradient() -> None:
    for layer, shape in (LAYERS[0], LAYERS[2]):
        frozen = _frozen(layer, Dense())
        bias = frozen.bias
        assert isinstance(bias, Tensor)
        bias.requires_grad_()
        reference = copy.deepcopy(layer)
        x = torch.randn(shape)
        frozen(x).square().sum().backward()
        reference(x).square().sum().backward()
        assert isinstance(reference.bias, Tensor)
        torch.testing.assert_close(bias.grad, reference.bias.grad)


def test_a_copy_that_is_trained_gets_the_gradient_of_its_weight() -> None:
    frozen = copy.deepcopy(_frozen(LAYERS[0][0], Dense())).requires_grad_()
    frozen(torch.randn(3, 12)).sum().backward()
    assert frozen.get_parameter("weight").grad is not None


def test_moves_to_another_dtype_and_state_as_any_layer() -> None:
    frozen = _frozen(LAYERS[2][0], Dense())
    assert frozen.to(torch.bfloat16).weight.dtype == torch.bfloat16
    quantised = _frozen(LAYERS[2][0], Int8())
    assert set(quantised.state_dict()) == {"weight_data", "weight_scale", "bias"}
    assert copy.deepcopy(quantised).weight.equal(quantised.weight)


def test_layers_of_other_kinds_stay_as_they_are() -> None:
    class Special(nn.Linear):
        pass

    assert not can_freeze(Special(2, 2))
    assert not can_freeze(nn.Conv2d(2, 2, 3, padding_mode="reflect"))
    assert not can_freeze(nn.Conv2d(2, 2, 3, padding="same"))
    assert not can_freeze(nn.LayerNorm(2))
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Conv2d(2, 2, 1))
    freeze_remaining(model)
    assert [isinstance(layer, FrozenLayer) for layer in model] == [True, False, True]
