"""Every method of the installed PEFT is trained, saved, resumed, reloaded and merged, or refused by its name with the reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch import Trainer
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

from lit_lora import AdapterCheckpoint, FromFile, LoraDiffusion, UserError
from lit_lora.adapter_tools.describe import SHARED, describe
from lit_lora.cli import main
from lit_lora.formats.find import read_adapter
from tests.helpers import diffusion_module, loader_of, make_batches

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's advice on single methods

KINDS: dict[str, type[PeftConfig]] = {
    getattr(name, "value", name): kind for name, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items()
}
NEAR = 1e-5

OPTIONS: dict[str, dict[str, Any]] = {
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 16},
    "FROD": {"target_modules": ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]},  # layers of one size
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["norm1"]},
    "MISS": {"r": 2},
    "OFT": {"oft_block_size": 4, "r": 0},
    "PSOFT": {"r": 2},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "VBLORA": {"vector_length": 8, "num_vectors": 4, "topk": 2},
    "WAVEFT": {"n_frequency": 16},
}
"""Options without which a method does not fit the tiny model."""

REFUSED = {
    **dict.fromkeys(("XLORA", "POLY", "TRAINABLE_TOKENS", "ADAPTION_PROMPT", "SHADOW"), "needs a language model"),
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE", "CPT"),
        "adapts prompts, not layers",
    ),
}
"""Methods that cannot adapt the layers of a denoiser."""

NOT_MERGED = {"BEFT": "Base layer has no bias, cannot merge", "LILY": "This method is not supported for Lily"}
"""What PEFT cannot merge, with its reason."""


def config_of(name: str) -> PeftConfig:
    options: dict[str, Any] = {"target_modules": ["attn1.to_q"]} | OPTIONS.get(name, {})
    return KINDS[name](**options)


def trained(
    base: Path, config: PeftConfig, steps: int, folder: Path, options: dict[str, Any], resume: Path | None = None
) -> LoraDiffusion:
    module = diffusion_module(base, copy.deepcopy(config))
    saving = AdapterCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)
    trainer = Trainer(
        **options | {"max_steps": steps, "max_epochs": -1, "enable_checkpointing": True}, callbacks=[saving]
    )
    trainer.fit(module, loader_of(make_batches(1)), ckpt_path=resume)
    return module


def output(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noisy, text = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 5, 16)))
    with torch.no_grad():
        found: Tensor = model.eval()(noisy, torch.tensor([7]), text).sample
    return found


@pytest.mark.parametrize(
    "name", [name for name in KINDS if name not in {"ADALORA", *REFUSED}]
)  # AdaLoRA has its own tests
def test_a_method_of_layers(
    name: str, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(name)
    module = trained(sd_folder, config, 2, tmp_path / "run", trainer_options)
    resumed = trained(sd_folder, config, 2, tmp_path / "resumed", trainer_options, tmp_path / "run" / "step=1.ckpt")
    state, expected = resumed.state_dict(), module.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in expected.items())
    adapted = output(module.family.denoiser)
    before = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    assert (adapted - output(before)).abs().max() > 10 * NEAR

    folder = tmp_path / "run" / "last.adapter"
    plain = PeftModel.from_pretrained(UNet2DConditionModel.from_pretrained(sd_folder / "unet"), folder)
    assert (output(plain) - adapted).abs().max() <= NEAR
    again = diffusion_module(sd_folder, FromFile(path=str(folder)))
    again.configure_model()
    assert (output(again.family.denoiser) - adapted).abs().max() <= NEAR

    facts = describe(read_adapter(folder), folder)
    layers = {name for name, _ in before.named_modules()}
    assert {one.name for one in facts.layers} - {SHARED} <= layers
    assert main(["adapter", "check", str(folder)]) == 0, capsys.readouterr().err
    assert "tensors fit UNet2DConditionModel" in capsys.readouterr().out

    status = main(["adapter", "merge", str(folder), str(tmp_path / "whole"), "--into", str(sd_folder)])
    if name in NOT_MERGED:
        assert status == 2
        assert NOT_MERGED[name] in " ".join(capsys.readouterr().err.split())
        return
    assert status == 0
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "whole" / "unet")
    assert (output(merged) - adapted).abs().max() <= NEAR


@pytest.mark.parametrize("name", [name for name in KINDS if name in REFUSED])
def test_a_method_of_language_models(name: str, sd_folder: Path) -> None:
    options: dict[str, Any] = {"task_type": "CAUSAL_LM"} if name == "CPT" else {}
    module = diffusion_module(sd_folder, KINDS[name](**options))
    with pytest.raises(UserError, match=f"{KINDS[name].__name__} {REFUSED[name]}"):
        module.configure_model()
