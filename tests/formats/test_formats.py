"""Formats give back what they have written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from peft import LoHaConfig, LoraConfig, PeftConfig

from lit_lora.adapters import adapter_state, plain_config
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.formats import (
    FORMATS,
    AdapterFiles,
    AdapterFormat,
    DiffusersFormat,
    PeftFormat,
    TensorFile,
    write_adapter,
)
from tests.formats.adapters import encoder_adapter

CONFIGS: dict[str, Any] = {
    "LoRA": lambda: LoraConfig(r=2, lora_alpha=4, rank_pattern={"to_q": 3}),
    "DoRA": lambda: LoraConfig(r=2, lora_alpha=2, use_dora=True),
    "LoHa": lambda: LoHaConfig(r=2, alpha=2),
}


def adapter_for(folder: Path, config: PeftConfig) -> AdapterFiles:
    family = StableDiffusion(str(folder))
    family.load(torch.float32, without=("vae", "text"))
    family.add_adapter(config)
    return AdapterFiles(
        adapter_state(family.denoiser),
        plain_config(config) | {"base_model_name_or_path": "a base"},
        metadata={"modelspec.trigger_phrase": "a \u2605 star", "ss_steps": "12"},
        family=StableDiffusion,
    )


def same(one: AdapterFiles, other: AdapterFiles) -> None:
    """Both hold the same bits and settings."""
    assert one.state.keys() == other.state.keys()
    assert all(torch.equal(value, other.state[key]) for key, value in one.state.items())
    assert all(value.dtype == other.state[key].dtype for key, value in one.state.items())
    assert dict(one.config) | {"inference_mode": True} == dict(other.config) | {"inference_mode": True}
    assert one.text_encoders.keys() == other.text_encoders.keys()
    for name, encoder in one.text_encoders.items():
        same(encoder, other.text_encoders[name])


@pytest.mark.parametrize("encoders", [{}, {"text_encoder": encoder_adapter()}], ids=["denoiser", "with encoder"])
@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.name)
@pytest.mark.parametrize("name", CONFIGS)
def test_reads_what_it_has_written(
    one: AdapterFormat, name: str, encoders: dict[str, AdapterFiles], sd_folder: Path, tmp_path: Path
) -> None:
    adapter = replace(adapter_for(sd_folder, CONFIGS[name]()), text_encoders=encoders)
    if not one.holds(adapter):
        assert one.name in ("diffusers", "kohya", "comfyui")
        assert name == "LoHa"
        return
    one.write(adapter, tmp_path)
    file = TensorFile.open(tmp_path / one.file_name)
    assert [other.name for other in FORMATS if other.recognizes(file)] == [one.name]
    read = one.read(file)
    same(read, adapter)
    assert read.metadata.items() >= adapter.metadata.items()
    assert read.family is StableDiffusion


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.name)
def test_the_same_adapter_gives_the_same_bytes(one: AdapterFormat, sd_folder: Path, tmp_path: Path) -> None:
    adapter = adapter_for(sd_folder, CONFIGS["LoRA"]())
    written = []
    for _ in range(4):  # the order of safetensors' metadata varies
        one.write(adapter, tmp_path)
        written.append((tmp_path / one.file_name).read_bytes())
    assert len(set(written)) == 1


def test_an_adapter_is_written_in_each_default_format_that_holds_it(sd_folder: Path, tmp_path: Path) -> None:
    peft = {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    for name, files in (("LoRA", {*peft, "pytorch_lora_weights.safetensors"}), ("LoHa", peft)):
        folder = tmp_path / name
        folder.mkdir()
        write_adapter(adapter_for(sd_folder, CONFIGS[name]()), folder)
        assert {path.name for path in folder.iterdir()} == files


def test_a_named_format_that_does_not_hold_the_adapter(sd_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"in the format diffusers: it holds LoRA, and this is LOHA"):
        write_adapter(adapter_for(sd_folder, CONFIGS["LoHa"]()), tmp_path, ["diffusers"])
    with pytest.raises(UserError, match="format 'cohya' is not known; choose from peft, diffusers, kohya"):
        write_adapter(adapter_for(sd_folder, CONFIGS["LoHa"]()), tmp_path, ["cohya"])


def test_what_diffusers_files_do_not_hold(sd_folder: Path) -> None:
    adapter = adapter_for(sd_folder, CONFIGS["LoRA"]())

    class NoLora(StableDiffusion):
        pipeline_class = DiffusionPipeline

    why_not = DiffusersFormat().why_not
    assert why_not(replace(adapter, family=NoLora)) == "DiffusionPipeline has no LoRA files"
    assert "is not known" in why_not(replace(adapter, family=None))
    assert "bias='all'" in why_not(replace(adapter, config={**adapter.config, "bias": "all"}))
    encoders = {"text_encoder_3": encoder_adapter()}
    assert "do not hold text_encoder_3" in why_not(replace(adapter, text_encoders=encoders))


def test_a_config_that_is_no_object(sd_folder: Path, tmp_path: Path) -> None:
    PeftFormat().write(adapter_for(sd_folder, CONFIGS["LoRA"]()), tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match="does not hold a JSON object"):
        PeftFormat().read(TensorFile.open(tmp_path / "adapter_model.safetensors"))
