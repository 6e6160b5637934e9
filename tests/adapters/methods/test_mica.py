from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from peft import LoraConfig

from lit_lora.adapters import inject, method_of
from lit_lora.adapters.methods import MicaMethod
from lit_lora.callbacks import EvaInitialization
from lit_lora.errors import UserError
from lit_lora.quantization import Int8
from tests.callbacks.test_loftq_initialization import STEPS, diffusion, fit
from tests.helpers import difference_in_plain_libraries, tiny_unet

MICA = {"r": 2, "lora_alpha": 3, "target_modules": ["to_q", "to_v"], "init_lora_weights": "mica"}


def trained(
    base: Path, options: dict[str, Any], folder: Path, *callbacks: Callback, at: int = 0, resume: Path | None = None
) -> Any:
    module = diffusion(base, None, adapter=LoraConfig(**MICA))
    fit(module, options, folder, *callbacks, at=at, resume=resume)
    return module


def test_b_is_frozen_where_the_base_does_least() -> None:
    assert type(method_of(LoraConfig(**MICA))) is MicaMethod
    unet = tiny_unet()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    left = torch.linalg.svd(unet.get_submodule(name).weight.detach()).U
    layer: Any = inject(unet, LoraConfig(**MICA), ()).get_base_model().get_submodule(name)
    b = layer.lora_B["default"].weight
    assert (left[:, -2:].T @ b).abs().max() > 0.999
    assert (left[:, :-2].T @ b).abs().max() < 1e-4
    assert not b.requires_grad
    assert not layer.lora_A["default"].weight.any()


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_trained_resumed_and_exported_as_lora(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    module = trained(sd_folder, trainer_options, tmp_path / "one")
    folder = tmp_path / "one" / f"step={STEPS}.adapter"
    in_diffusers, in_peft, from_base = difference_in_plain_libraries(module.family.denoiser, sd_folder, folder)
    assert in_diffusers <= 1e-5
    assert in_peft <= 1e-5
    assert from_base > 1e-3
    assert json.loads((folder / "adapter_config.json").read_text())["init_lora_weights"] is True
    trained(sd_folder, trainer_options, tmp_path / "two", at=2, resume=tmp_path / "one" / "step=2.ckpt")
    again = tmp_path / "two" / f"step={STEPS}.adapter" / "adapter_model.safetensors"
    assert again.read_bytes() == (folder / "adapter_model.safetensors").read_bytes()


def test_a_quantized_base_does_not_change(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    module = diffusion(sd_folder, Int8(), adapter=LoraConfig(**MICA))
    fit(module, trainer_options, tmp_path)
    assert all(p.any() for name, p in module.named_parameters() if "lora_" in name)


def test_what_cannot_be_combined(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be combined with use_dora"):
        inject(tiny_unet(), LoraConfig(**MICA, use_dora=True), ())
    with pytest.raises(UserError, match="does not fit UNet2DConditionModel"):
        inject(tiny_unet(), LoraConfig(**MICA | {"target_modules": ["conv1"]}), ())
    with pytest.raises(UserError, match="the adapter sets init_lora_weights='mica'"):
        trained(sd_folder, trainer_options, tmp_path, EvaInitialization(steps=1))
