from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoHaConfig, LoraConfig
from torch import nn

from lit_lora.adapters import adapter_state
from lit_lora.adapters.fused_lora import FusedLoraLinear
from lit_lora.denoiser_options import use_channels_last
from lit_lora.distributed.fsdp import LitLoraFSDP
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.module import LoraDiffusion
from lit_lora.run_checks import check_run
from tests.helpers import loader_of, make_batches


def trained(folder: Path, options: dict[str, Any], **more: Any) -> LoraDiffusion:
    torch.manual_seed(0)
    adapter = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "conv1"], init_lora_weights="gaussian")
    module = LoraDiffusion(StableDiffusion(str(folder)), adapter, base_dtype="float32", **more)
    Trainer(**options | {"max_steps": 3}).fit(module, loader_of(make_batches(3)))
    return module


def test_options_change_only_the_rounding(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    plain = trained(sd_folder, trainer_options)
    ours = trained(sd_folder, trainer_options, convolutions="channels_last", fused_lora=True)
    convolutions = [
        layer.weight
        for layer in ours.family.denoiser.modules()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size > (1, 1)
    ]
    formats = {
        weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions if not weight.requires_grad
    }
    assert formats == {True}
    fused = [layer for layer in ours.family.denoiser.modules() if isinstance(layer, FusedLoraLinear)]
    assert len(fused) == sum("to_q.lora_A" in name for name, _ in ours.named_parameters())
    expected = adapter_state(plain.family.denoiser)
    for name, value in adapter_state(ours.family.denoiser).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    ours.save_adapter(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_options_without_effect_are_refused(sd_folder: Path) -> None:
    module = LoraDiffusion(StableDiffusion(str(sd_folder)), LoHaConfig(r=2), fused_lora=True)
    with pytest.raises(
        UserError, match="fused_lora has no effect, since no frozen Linear layer has an adapter of LoRA"
    ):
        module.configure_model()
    with pytest.raises(UserError, match="'channels_last' has no effect, since Linear has no Conv2d layer"):
        use_channels_last(nn.Linear(2, 2))


def test_strategies_that_need_contiguous_weights_are_refused(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    module = LoraDiffusion(StableDiffusion(str(sd_folder)), LoraConfig(r=2), convolutions="channels_last")
    module.trainer = Trainer(**trainer_options | {"strategy": LitLoraFSDP()})
    with pytest.raises(UserError, match=r"'channels_last' is for one device and for strategy ddp: LitLoraFSDP needs"):
        check_run(module, "fit")
