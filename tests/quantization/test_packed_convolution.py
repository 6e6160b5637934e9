from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig
from torch import nn

from lit_lora.adapters import adapter_state
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.module import LoraDiffusion
from lit_lora.planning.plan_run import plan_run
from lit_lora.quantization import NF4
from lit_lora.quantization.dense import Dense
from lit_lora.quantization.frozen_layer import freeze_layer
from lit_lora.quantization.packed_convolution import PackedConv2d, pack_convolutions
from lit_lora.run_checks import check_run
from tests.helpers import loader_of, make_batches

KINDS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1},
    {"kernel_size": (3, 1), "padding": (1, 0), "bias": False},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 3, "padding": 1, "groups": 4},
    {"kernel_size": 1, "padding": 2},
]
"""Options of convolutions, strided, grouped, and with more padding than their kernel reaches among them."""


def both(options: dict[str, Any], dtype: torch.dtype) -> tuple[nn.Conv2d, nn.Conv2d]:
    """A frozen convolution and the same one, packed."""
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, **options).requires_grad_(False)
    freeze_layer(layer, Dense(), layer.weight.detach().to(dtype), dtype)
    layer.to(dtype)
    packed = copy.deepcopy(layer)
    pack_convolutions(packed)
    assert type(packed) is PackedConv2d
    return layer, packed


def output_and_gradient(layer: nn.Module, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    image = torch.randn(2, 8, 10, 9, dtype=dtype, requires_grad=True)
    output = layer(image)
    output.backward(torch.randn(output.shape, dtype=dtype))
    assert image.grad is not None
    return output.detach(), image.grad


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_output_and_gradient_differ_by_rounding(options: dict[str, Any], dtype: torch.dtype, near: float) -> None:
    layer, packed = both(options, dtype)
    for _ in range(2):  # the second call uses the copies of the first
        for ours, expected in zip(output_and_gradient(packed, dtype), output_and_gradient(layer, dtype), strict=True):
            assert ours.shape == expected.shape
            torch.testing.assert_close(ours, expected, rtol=near, atol=near)


def test_a_cpu_that_does_not_compute_in_bfloat16(
    sd_folder: Path, trainer_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_lora.quantization.packed_convolution.can_pack", lambda dtype: dtype == torch.float32)
    layer, packed = both(KINDS[0], torch.bfloat16)
    for ours, expected in zip(
        output_and_gradient(packed, torch.bfloat16), output_and_gradient(layer, torch.bfloat16), strict=True
    ):
        assert torch.equal(ours, expected)
    assert packed.packed == {}
    monkeypatch.setattr("lit_lora.run_checks.can_pack", lambda dtype: dtype == torch.float32)
    module = LoraDiffusion(StableDiffusion(str(sd_folder)), LoraConfig(r=2), convolutions="packed")
    module.trainer = Trainer(**trainer_options)
    with pytest.raises(UserError, match=r"'packed' needs a CPU that computes in bfloat16, .* or base_dtype float32"):
        check_run(module, "fit")


def test_a_changed_weight_is_packed_anew() -> None:
    layer, packed = both(KINDS[0], torch.float32)
    output_and_gradient(packed, torch.float32)
    for change in (lambda weight: weight.mul_(3), lambda weight: setattr(weight, "data", weight + 1)):
        for one in (layer, packed):
            with torch.no_grad():
                change(one.weight)
        for ours, expected in zip(
            output_and_gradient(packed, torch.float32), output_and_gradient(layer, torch.float32), strict=True
        ):
            torch.testing.assert_close(ours, expected)
    assert len(packed.packed) == 2  # type: ignore[arg-type]  # old copies are gone


def test_copies_and_files_hold_the_weight_alone() -> None:
    _, packed = both(KINDS[0], torch.float32)
    output_and_gradient(packed, torch.float32)
    assert packed.state_dict().keys() == {"weight", "bias"}
    for again in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert again.packed == {}
        assert torch.equal(output_and_gradient(again, torch.float32)[1], output_and_gradient(packed, torch.float32)[1])


def test_training_draws_and_saves_as_without(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    modules = []
    for convolutions in ("plain", "packed"):
        torch.manual_seed(0)
        adapter = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "conv1"], init_lora_weights="gaussian")
        module = LoraDiffusion(
            StableDiffusion(str(sd_folder)), adapter, base_dtype="float32", convolutions=convolutions
        )
        Trainer(**trainer_options | {"max_steps": 3}).fit(module, loader_of(make_batches(3)))
        modules.append(module)
    plain, packed = modules
    expected = adapter_state(plain.family.denoiser)
    for name, value in adapter_state(packed.family.denoiser).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    used = [layer for layer in packed.family.denoiser.modules() if isinstance(layer, PackedConv2d)]
    assert used
    assert all(layer.packed for layer in used)
    packed.save_adapter(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    images = [module.generate(["a"], num_inference_steps=1, seeds=[0])[0] for module in modules]
    assert max(high for _, high in images[0].getextrema()) > 0
    assert max(abs(a - b) for a, b in zip(images[0].tobytes(), images[1].tobytes(), strict=True)) <= 2


def test_the_plan_counts_the_copies(sd_folder: Path) -> None:
    plain, packed = (
        LoraDiffusion(StableDiffusion(str(sd_folder)), LoraConfig(r=2), convolutions=convolutions)
        for convolutions in ("plain", "packed")
    )
    weights = [plan_run(module, 1, 32, 32).phases["forward"]["frozen weights"] for module in (plain, packed)]
    packed.configure_model()
    layers = [layer for layer in packed.modules() if isinstance(layer, PackedConv2d)]
    twice = sum((1 if set(layer.stride) == {2} else 2) * layer.weight.nbytes for layer in layers)
    assert weights[1] - weights[0] == twice > 0


def test_where_it_has_no_effect_it_is_refused(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="'packed' has no effect, since Linear has no Conv2d layer with a dense frozen"):
        pack_convolutions(nn.Linear(2, 2))
    quantized = LoraDiffusion(StableDiffusion(str(sd_folder)), LoraConfig(), quantization=NF4(), convolutions="packed")
    quantized.family.load(torch.float32, quantization=NF4(skip=[]))
    module = LoraDiffusion(StableDiffusion(str(sd_folder)), LoraConfig(r=2), convolutions="packed")
    module.trainer = Trainer(**trainer_options)
    module.trainer.strategy._root_device = torch.device("meta")
    with pytest.raises(UserError, match="'packed' is for CPUs, and this run computes on meta"):
        check_run(module, "fit")
