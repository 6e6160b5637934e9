"""Every adapter on every quantization: gradients, training, and the same files as on a dense base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file

from lit_lora.errors import UserError
from lit_lora.families import ModelFamily, StableDiffusion
from lit_lora.parameters import trainable_parameters
from lit_lora.quantization import FP8, NF4, W8A8, Dense, Int8, Quantization, sharded_parts
from lit_lora.quantization.base import Stored
from tests.helpers import save_adapter

LINEAR = ["to_q", "to_k", "to_v", "to_out.0"]
BOTH = [*LINEAR, "conv1", "conv2"]
ADAPTERS: dict[str, PeftConfig] = {
    "LoRA": peft.LoraConfig(r=2, lora_alpha=2, target_modules=BOTH),
    "DoRA": peft.LoraConfig(r=2, lora_alpha=2, target_modules=BOTH, use_dora=True),
    "rsLoRA": peft.LoraConfig(r=2, lora_alpha=2, target_modules=LINEAR, use_rslora=True),
    "LoHa": peft.LoHaConfig(r=2, alpha=2, target_modules=BOTH),
    "LoKr": peft.LoKrConfig(r=2, alpha=2, target_modules=BOTH),
    "AdaLoRA": peft.AdaLoraConfig(init_r=2, target_r=1, total_step=100, tinit=10, tfinal=20, target_modules=LINEAR),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, target_modules=LINEAR),
    "IA3": peft.IA3Config(target_modules=LINEAR, feedforward_modules=[]),
    "HRA": peft.HRAConfig(r=2, target_modules=LINEAR),
    "VeRA": peft.VeraConfig(r=4, target_modules=["to_q", "to_out.0"]),
    "FourierFT": peft.FourierFTConfig(n_frequency=8, target_modules=LINEAR),
}
QUANTIZATIONS = {"Int8": Int8(), "W8A8": W8A8(), "FP8": FP8(), "NF4": NF4()}


def _family(folder: Path, quantization: Quantization, adapter: str) -> ModelFamily:
    family = StableDiffusion(str(folder))
    family.load(torch.float32, without=("vae", "text"), quantization=quantization)
    torch.manual_seed(3)
    family.add_adapter(copy.deepcopy(ADAPTERS[adapter]))
    return family


def _prediction(family: ModelFamily) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    noisy, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    return family.denoise(noisy, torch.tensor([7, 90]), {"encoder_hidden_states": text})


def _dense_copy(quantised: ModelFamily, folder: Path, adapter: str) -> ModelFamily:
    """The same model with the weights that the quantization gives back, stored densely."""
    dense = _family(folder, Dense(), adapter)
    modules = dict(quantised.denoiser.named_modules())
    with torch.no_grad():
        for name, layer in dense.denoiser.named_modules():
            if isinstance(getattr(layer, "quantization", None), Dense):
                layer.weight.copy_(modules[name].weight)
        own = dict(quantised.denoiser.named_parameters())
        for name, parameter in dense.denoiser.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(own[name])
    return dense


@pytest.mark.parametrize("quantization", [name for name in QUANTIZATIONS if name != "W8A8"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_gradients_are_those_over_the_weights_that_the_storage_gives_back(
    quantization: str, adapter: str, sd_folder: Path
) -> None:
    quantised = _family(sd_folder, QUANTIZATIONS[quantization], adapter)
    frozen = {name: p.clone() for name, p in quantised.denoiser.named_parameters() if not p.requires_grad}
    with torch.no_grad():
        for parameter in trainable_parameters(quantised):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    dense = _dense_copy(quantised, sd_folder, adapter)
    mine, theirs = _prediction(quantised), _prediction(dense)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    mine.square().mean().backward()
    theirs.square().mean().backward()
    expected = {name: p.grad for name, p in dense.denoiser.named_parameters() if p.requires_grad}
    assert expected
    for name, parameter in quantised.denoiser.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)
        else:
            assert torch.equal(parameter, frozen[name])


# FourierFT's first values make this model chaotic: noise of 0.5 % in its weights changes half of its output.
@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name != "FourierFT"])
def test_rounded_products_change_outputs_and_gradients_little(adapter: str, sd_folder: Path) -> None:
    rounded = _family(sd_folder, W8A8(), adapter)
    with torch.no_grad():
        for parameter in trainable_parameters(rounded):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    dense = _dense_copy(rounded, sd_folder, adapter)
    found = []
    for family in (rounded, dense):
        out = _prediction(family)
        out.square().mean().backward()
        gradients = [one.grad.flatten() for one in trainable_parameters(family) if one.grad is not None]
        found.append((out.detach(), torch.cat(gradients)))
    for mine, theirs in zip(*found, strict=True):
        assert 0 < (mine - theirs).norm() < 0.03 * theirs.norm()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("adapter", ["LoRA", "DoRA", "LoKr", "OFT"])
def test_files_are_the_same_as_on_a_dense_base(
    quantization: str, adapter: str, sd_folder: Path, tmp_path: Path
) -> None:
    files = []
    for name, kind in (("quantised", QUANTIZATIONS[quantization]), ("dense", Dense())):
        (tmp_path / name).mkdir()
        save_adapter(_family(sd_folder, kind, adapter), tmp_path / name)
        files.append({file.name: file for file in (tmp_path / name).iterdir()})
    assert files[0].keys() == files[1].keys()
    for name in files[0]:
        if name.endswith(".safetensors"):
            one, other = load_file(files[0][name]), load_file(files[1][name])
            assert {key: (t.shape, t.dtype) for key, t in one.items()} == {
                key: (t.shape, t.dtype) for key, t in other.items()
            }
        else:
            assert files[0][name].read_text() == files[1][name].read_text()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_training_copies_of_quantised_layers_is_refused(quantization: str, sd_folder: Path) -> None:
    family = StableDiffusion(str(sd_folder))
    family.load(torch.float32, without=("vae", "text"), quantization=QUANTIZATIONS[quantization])
    config = peft.LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv1"])
    with pytest.raises(UserError, match=rf"modules_to_save .*conv1, .*{quantization}.*skip: \['\*conv1'\]"):
        family.add_adapter(config)


def test_an_adapter_that_is_frozen_still_computes(sd_folder: Path) -> None:
    family = _family(sd_folder, Int8(), "LoRA")
    expected = _prediction(family)
    family.requires_grad_(False)
    assert torch.equal(_prediction(family), expected)


def test_training_copies_of_layers_that_are_skipped_works(sd_folder: Path) -> None:
    family = StableDiffusion(str(sd_folder))
    family.load(torch.bfloat16, without=("vae", "text"), quantization=Int8(skip=["*conv1"]))
    family.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv1"]))
    with torch.autocast("cpu", torch.bfloat16):
        _prediction(family).float().square().mean().backward()
    trained = {name: p for name, p in family.denoiser.named_parameters() if "modules_to_save" in name}
    assert all(p.grad is not None for name, p in trained.items() if name.endswith("weight"))
    assert any(name.endswith("weight") for name in trained)


@pytest.mark.parametrize("large", [1 << 30, 500], ids=["blocks", "layers"])
@pytest.mark.parametrize("quantization", [Dense(), NF4()], ids=["dense", "NF4"])
@pytest.mark.parametrize("adapter", [*ADAPTERS, "modules_to_save", "bias"])
def test_loading_block_by_block_gives_the_same_model(
    quantization: Quantization, adapter: str, large: int, sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What strategies that shard the weights do, large layers by themselves."""
    monkeypatch.setattr(sharded_parts, "_LARGE_LAYER", large)
    if adapter == "bias" and not isinstance(quantization, Dense):
        pytest.skip("biases are trained in a dense base alone")
    config = ADAPTERS.get(adapter) or peft.LoraConfig(
        r=2,
        lora_alpha=2,
        target_modules=LINEAR,
        **({"modules_to_save": ["conv_out"]} if adapter == "modules_to_save" else {"bias": "all"}),
    )
    whole, in_blocks = StableDiffusion(str(sd_folder)), StableDiffusion(str(sd_folder))
    torch.manual_seed(3)
    whole.load(torch.float32, without=("vae", "text"), quantization=quantization)
    whole.add_adapter(copy.deepcopy(config))
    torch.manual_seed(3)
    in_blocks.load(torch.float32, without=("vae", "text", "denoiser"), quantization=quantization)
    complete: list[str] = []

    def shard(module: torch.nn.Module) -> None:
        assert not any(p.isnan().any() for p in module.parameters() if p.is_floating_point())
        complete.append(type(module).__name__)

    in_blocks.load_adapted(copy.deepcopy(config), shard)
    assert complete.count("ResnetBlock2D") > 1
    assert (complete.count("FrozenLinear") + complete.count("FrozenConv2d") > 3) is (large == 500)
    assert complete[-1] == "UNet2DConditionModel"
    expected, found = whole.denoiser.state_dict(), in_blocks.denoiser.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
    trained = [
        {name for name, p in family.denoiser.named_parameters() if p.requires_grad} for family in (whole, in_blocks)
    ]
    assert trained[0] == trained[1]
    torch.testing.assert_close(_prediction(in_blocks), _prediction(whole), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.DeloraConfig(r=2, target_modules=["to_q"]), "DeloraConfig is not known to train where the weights"),
        (peft.VBLoRAConfig(r=2, target_modules=["to_q"], vector_length=4), "VBLoRAConfig is not known to train"),
        (peft.LoraConfig(r=2, modules_to_save=["conv1"]), "modules_to_save would train a copy of .*conv1, .*=NF4"),
        (peft.LoraConfig(r=2, target_modules=["nothing"]), "^target_modules: 'nothing' matches no layer"),
    ],
)
def test_what_cannot_be_put_in_before_the_weights(config: PeftConfig, message: str, sd_folder: Path) -> None:
    family = StableDiffusion(str(sd_folder))
    family.load(torch.bfloat16, without=("vae", "text", "denoiser"), quantization=NF4())
    with pytest.raises(UserError, match=message):
        family.load_adapted(config, lambda module: None)


@pytest.mark.parametrize("adapter", ["LoRA", "DoRA", "LoHa"])
def test_injection_does_not_restore_a_weight_again_and_again(
    adapter: str, sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Stored] = []

    def dequantize(self: NF4, stored: Stored, *arguments: Any) -> torch.Tensor:
        asked.append(stored)
        return restore(self, stored, *arguments)

    restore = NF4.dequantize
    monkeypatch.setattr(NF4, "dequantize", dequantize)
    adapted = [layer for layer in _family(sd_folder, NF4(), adapter).denoiser.modules() if hasattr(layer, "base_layer")]
    # Twice where PEFT asks another layer in between.
    assert 0 < len(asked) <= 2 * len(adapted)
