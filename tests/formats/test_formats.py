"""Formats give back what they have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from peft import LoHaConfig, LoraConfig, PeftConfig

from lit_lora.adapters import adapter_state, plain_config
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.formats import FORMATS, AdapterFiles, AdapterFormat, DiffusersFormat, PeftFormat, write_adapter

CONFIGS: dict[str, Any] = {
    "LoRA": lambda: LoraConfig(r=2, lora_alpha=4, rank_pattern={"to_q": 3}),
    "DoRA": lambda: LoraConfig(r=2, lora_alpha=2, use_dora=True),
    "LoHa": lambda: LoHaConfig(r=2, alpha=2),
}


def adapter_for(folder: Path, config: PeftConfig) -> AdapterFiles:
    family = StableDiffusion(str(folder))
    family.load(torch.float32, without=("vae", "text"))
    family.add_adapter(config)
    return AdapterFiles(adapter_state(family.denoiser), plain_config(config) | {"base_model_name_or_path": "a base"})


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("name", CONFIGS)
def test_reads_what_it_has_written(one: AdapterFormat, name: str, sd_folder: Path, tmp_path: Path) -> None:
    config = CONFIGS[name]()
    adapter = adapter_for(sd_folder, config)
    if not one.holds(config, StableDiffusionPipeline):
        assert (type(one), name) == (DiffusersFormat, "LoHa")
        return
    one.write(adapter, tmp_path, StableDiffusionPipeline, "unet")
    read = one.read(tmp_path, StableDiffusionPipeline, "unet")
    assert read.state.keys() == adapter.state.keys()
    assert all(torch.equal(value, adapter.state[key]) for key, value in read.state.items())
    assert {key: read.config[key] for key in adapter.config if key != "inference_mode"} == {
        key: value for key, value in adapter.config.items() if key != "inference_mode"
    }


def test_an_adapter_is_written_in_each_format_that_holds_it(sd_folder: Path, tmp_path: Path) -> None:
    peft = {"adapter_model.safetensors", "adapter_config.json"}
    for name, files in (("LoRA", {*peft, "pytorch_lora_weights.safetensors"}), ("LoHa", peft)):
        folder = tmp_path / name
        folder.mkdir()
        config = CONFIGS[name]()
        write_adapter(adapter_for(sd_folder, config), config, folder, StableDiffusionPipeline, "unet")
        assert {path.name for path in folder.iterdir()} == files


def test_a_pipeline_that_writes_no_lora_files_is_left_alone() -> None:
    assert not DiffusersFormat().holds(LoraConfig(), DiffusionPipeline)


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: type(one).__name__)
def test_missing_and_damaged_files(one: AdapterFormat, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        one.read(tmp_path, StableDiffusionPipeline, "unet")
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        (tmp_path / name).write_bytes(b"not a file of tensors")
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match="cannot read"):
        one.read(tmp_path, StableDiffusionPipeline, "unet")


def test_a_config_that_is_no_object(sd_folder: Path, tmp_path: Path) -> None:
    PeftFormat().write(adapter_for(sd_folder, CONFIGS["LoRA"]()), tmp_path, StableDiffusionPipeline, "unet")
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match="does not hold a JSON object"):
        PeftFormat().read(tmp_path, StableDiffusionPipeline, "unet")
