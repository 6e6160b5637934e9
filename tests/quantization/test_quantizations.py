"""How weights are stored: error bounds, bytes, formats."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lit_lora.errors import UserError
from lit_lora.quantization import FP8, NF4, W8A8, Dense, Int8, Quantization
from lit_lora.quantization.nf4 import LEVELS

QUANTIZATIONS: list[Quantization] = [
    Int8(),
    W8A8(),
    FP8(),
    FP8("e5m2"),
    NF4(),
    NF4(double_quant=False),
    NF4(block_size=32),
    Dense(),
]


def _round_trip(quantization: Quantization, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return quantization.dequantize(quantization.quantize(weight), weight.shape, dtype)


def _bits(quantization: Quantization, weight: Tensor) -> float:
    return 8 * sum(t.numel() * t.element_size() for t in quantization.quantize(weight).values()) / weight.numel()


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=lambda s: f"{type(s).__name__}")
@pytest.mark.parametrize("shape", [(64, 64), (16, 4, 3, 3), (5, 7), (1, 3, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_comes_back_in_shape_and_dtype(quantization: Quantization, shape: Any, dtype: torch.dtype) -> None:
    weight = torch.randn(shape)
    restored = _round_trip(quantization, weight, dtype)
    assert restored.shape == weight.shape
    assert restored.dtype == dtype
    assert not restored.requires_grad
    error = (restored.float() - weight).norm() / weight.norm()
    assert error < 0.16


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=lambda s: f"{type(s).__name__}")
def test_zeros_stay_zeros(quantization: Quantization) -> None:
    assert (_round_trip(quantization, torch.zeros(8, 64)) == 0).all()


def test_int8_is_off_by_at_most_half_a_step_of_its_channel() -> None:
    weight = torch.randn(32, 8, 3, 3) * torch.logspace(-4, 4, 32).view(-1, 1, 1, 1)
    step = weight.abs().amax(dim=(1, 2, 3), keepdim=True) / 127
    assert ((_round_trip(Int8(), weight) - weight).abs() <= step * 0.5001).all()


def test_fp8_is_off_by_at_most_half_a_unit_of_its_mantissa() -> None:
    weight = torch.randn(32, 64)
    normal = weight.abs() > weight.abs().amax(dim=1, keepdim=True) * 2**-14
    relative = (_round_trip(FP8(), weight) - weight).abs() / weight.abs()
    assert relative[normal].max() <= 2**-4 * 1.001


@pytest.mark.parametrize("quantization", [FP8("e5m2"), FP8(), Int8()], ids=lambda s: type(s).__name__)
def test_small_weights_survive_float16(quantization: Quantization) -> None:
    weight = torch.randn(32, 64).clamp(-2, 2) * 1e-3
    in_float16 = _round_trip(quantization, weight, torch.float16).float()
    torch.testing.assert_close(in_float16, _round_trip(quantization, weight), rtol=2e-3, atol=1e-7)


def test_nf4_takes_the_nearest_level_of_each_block() -> None:
    weight = torch.randn(16, 64)
    restored = _round_trip(NF4(double_quant=False), weight)
    scale = weight.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(LEVELS)
    nearest = levels[((weight / scale)[..., None] - levels).abs().argmin(dim=-1)] * scale
    torch.testing.assert_close(restored, nearest)


@pytest.mark.parametrize("shape", [(64, 64), (32, 16, 3, 3)])
def test_nf4_is_bitsandbytes_own_format(shape: Any) -> None:
    weight = torch.randn(shape)
    stored = NF4(double_quant=False).quantize(weight)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(stored["weight_data"], packed.flatten())
    torch.testing.assert_close(stored["weight_scale"], state.absmax)
    torch.testing.assert_close(torch.tensor(LEVELS), state.code)


def test_stores_in_several_pieces_what_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(48, 96)
    whole = NF4().quantize(weight)
    restored = _round_trip(NF4(), weight)
    monkeypatch.setattr("lit_lora.quantization.nf4._BYTES_AT_A_TIME", 640)
    for name, tensor in NF4().quantize(weight).items():
        assert torch.equal(tensor, whole[name])
    assert torch.equal(_round_trip(NF4(), weight), restored)


def test_a_plan_takes_one_piece_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors have no contents: the stored ones are as large, and a model of 32 billion weights takes no minutes."""

    class Counter(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr("lit_lora.quantization.nf4._BYTES_AT_A_TIME", 256)
    calls, shapes = [], []
    for rows in (8, 64):
        with FakeTensorMode(), Counter() as counter:
            stored = NF4().quantize(torch.empty(rows, 64))
        calls.append(counter.calls)
        shapes.append({name: value.shape for name, value in stored.items()})
    assert calls[0] == calls[1]
    assert shapes[1] == {name: value.shape for name, value in NF4().quantize(torch.randn(64, 64)).items()}


def test_bits_of_a_weight() -> None:
    weight = torch.randn(512, 1024)
    assert _bits(Int8(), weight) == pytest.approx(8, abs=0.05)
    assert _bits(FP8(), weight) == pytest.approx(8, abs=0.05)
    assert _bits(NF4(double_quant=False), weight) == pytest.approx(4.5, abs=0.01)
    assert _bits(NF4(), weight) == pytest.approx(4.127, abs=0.01)


def test_small_blocks_are_more_exact() -> None:
    weight = torch.randn(128, 512)
    errors = [(_round_trip(NF4(block_size=n), weight) - weight).norm() for n in (32, 64, 256)]
    assert errors == sorted(errors)


def test_double_quantisation_costs_little() -> None:
    weight = torch.randn(128, 1024)
    plain = (_round_trip(NF4(double_quant=False), weight) - weight).norm()
    assert (_round_trip(NF4(), weight) - weight).norm() < plain * 1.02


@pytest.mark.parametrize("block_size", [0, -2, 63])
def test_odd_blocks_are_refused(block_size: int) -> None:
    with pytest.raises(
        UserError,
        match=f"block_size={block_size} is (not possible; .* even|too small; .* at least 2)",
    ):
        NF4(block_size=block_size)


def test_which_layers_it_takes() -> None:
    quantization = Int8(skip=["mid_block.*"])
    assert quantization.takes("down_blocks.0.conv", ["conv_in"])
    assert not quantization.takes("mid_block.attn.to_q", ["conv_in"])
    assert not quantization.takes("conv_in", ["conv_in"])
    assert not Dense().takes("down_blocks.0.conv")


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=lambda s: f"{type(s).__name__}")
def test_the_cpu_can_do_all(quantization: Quantization) -> None:
    quantization.check(torch.device("cpu"))


def test_a_device_that_cannot_do_it_is_refused_with_the_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise RuntimeError("no such kernel\nmore")

    monkeypatch.setattr(FP8, "dequantize", fail)
    with pytest.raises(
        UserError, match=r"quantization=FP8: cpu does not support .*no such kernel\).*lit_lora.quantization.Int8"
    ):
        FP8().check(torch.device("cpu"))
