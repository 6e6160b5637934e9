"""Products in 8-bit integers: their values, gradients, bounds of their errors, and when they are not used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_lora.errors import UserError
from lit_lora.quantization import W8A8, Int8
from lit_lora.quantization.frozen_layer import FrozenLinear, freeze_layer


def _layer(dtype: torch.dtype = torch.float32, bias: bool = True) -> FrozenLinear:
    layer = nn.Linear(48, 32, bias=bias, dtype=dtype).requires_grad_(False)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-1, 1, 32)[:, None])
    freeze_layer(layer, W8A8(), layer.weight.detach(), dtype)
    assert isinstance(layer, FrozenLinear)
    return layer


def _rounded(rows: Tensor) -> Tensor:
    """Rows with their values as multiples of 1/127 of the largest, in float64."""
    steps = rows.double().abs().amax(dim=1, keepdim=True) / 127
    return (rows.double() / steps).round() * steps


def _restored(layer: FrozenLinear) -> Tensor:
    return layer.get_parameter("weight_data").double() * layer.get_parameter("weight_scale").double()


@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (1, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_products_of_rounded_rows(shape: Any, bias: bool) -> None:
    layer = _layer(bias=bias)
    x = (torch.randn(shape) * 3).requires_grad_()
    out = layer(x)
    weight = _restored(layer)
    expected = (_rounded(x.detach().flatten(0, -2)) @ weight.T).view(out.shape)
    torch.testing.assert_close(out.double(), expected + (layer.bias.double() if bias else 0), rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(out)
    out.backward(grad)
    scale, data = layer.get_parameter("weight_scale"), layer.get_parameter("weight_data")
    assert x.grad is not None
    expected = (_rounded(grad.flatten(0, -2) * scale.T) @ data.double()).view(shape)
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_each_input_is_off_by_at_most_half_a_step_of_its_row() -> None:
    layer = _layer(bias=False)
    x = torch.randn(64, 48) * torch.logspace(-4, 4, 64)[:, None]
    weight = _restored(layer)
    error = (layer(x).double() - x.double() @ weight.T).abs()
    half_steps = x.abs().amax(dim=1, keepdim=True).double() / 254
    assert (error <= half_steps * weight.abs().sum(dim=1) * 1.0001).all()
    assert error.max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_and_in_half_precision(dtype: torch.dtype) -> None:
    layer = _layer(dtype)
    x = torch.randn(7, 48, dtype=dtype).requires_grad_()
    out = layer(x)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    with torch.autocast("cpu", dtype):
        assert torch.equal(layer(x.detach().float()), out)


def test_no_weight_is_restored_for_a_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer()
    convolution = nn.Conv2d(3, 4, 1).requires_grad_(False)
    freeze_layer(convolution, W8A8(), convolution.weight.detach(), torch.float32)
    image = torch.randn(1, 3, 4, 4).requires_grad_()
    convolution(image).sum().backward()
    monkeypatch.setattr(W8A8, "dequantize", None)
    layer(torch.randn(4, 48).requires_grad_()).sum().backward()
    with pytest.raises(TypeError):
        convolution(image)


def test_sizes_that_the_kernel_does_not_take_are_multiplied_as_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer()
    x = torch.randn(4, 48).requires_grad_()
    monkeypatch.setattr("lit_lora.quantization.w8a8._multiplies", lambda rows, inner, outer: False)
    out = layer(x)
    weight = layer.weight
    torch.testing.assert_close(out, nn.functional.linear(x, weight, layer.bias))
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(4, 32) @ weight)


def test_what_is_not_finite_stays_visible_in_its_row_alone() -> None:
    layer = _layer()
    x = torch.randn(6, 48)
    expected = layer(x)
    x[1, 3], x[4, 0] = torch.nan, torch.inf
    out = layer(x)
    bad = ~out.isfinite().all(dim=1)
    assert bad.tolist() == [False, True, False, False, True, False]
    assert torch.equal(out[~bad], expected[~bad])


def test_rows_of_zeros_and_tiny_rows() -> None:
    layer = _layer(bias=False)
    x = torch.zeros(2, 48)
    x[1] = 1e-36
    out = layer(x)
    assert (out[0] == 0).all()
    torch.testing.assert_close(out[1], x[1] @ layer.weight.T, rtol=1e-2, atol=0)


def test_a_compiler_gets_the_same() -> None:
    layer = _layer()
    x = torch.randn(5, 48).requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    expected, x.grad = x.grad, None
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    again = compiled(x)
    again.square().sum().backward()
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(x.grad, expected)


def test_a_device_that_cannot_multiply_integers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    W8A8().check(torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_int_mm", lambda a, b: torch.zeros(len(a), b.shape[1], dtype=torch.int32))
        with pytest.raises(UserError, match=r"W8A8: cpu returns wrong values in this format; use lit_lora\S+Int8"):
            W8A8().check(torch.device("cpu"))

    def refuse(*_: object) -> None:
        raise RuntimeError("no such kernel\nmore")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    with pytest.raises(UserError, match=r"W8A8: cpu does not support this format \(no such kernel\); use"):
        W8A8().check(torch.device("cpu"))
    Int8().check(torch.device("cpu"))
