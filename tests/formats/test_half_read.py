"""Files of which a part would be lost in silence are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoraConfig
from torch import Tensor

from lit_lora.errors import UserError
from lit_lora.families.native_layers import NativeLayer
from lit_lora.formats import AdapterFiles, format_named, write_adapter
from lit_lora.formats.find import read_adapter
from lit_lora.formats.fused import LoraFactors, fuse
from lit_lora.formats.tensor_file import TensorFile, write_tensors
from tests.formats.adapters import encoder_adapter
from tests.formats.test_formats import adapter_for


@pytest.fixture(scope="module")
def adapter(sd_folder: Path) -> AdapterFiles:
    part = {"text_encoder": encoder_adapter()}
    return replace(adapter_for(sd_folder, LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"])), text_encoders=part)


def rewritten(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    old = TensorFile.open(file)
    tensors = {name: value.clone() for name, value in tensors.items()}
    write_tensors(file, tensors, old.metadata if metadata is None else metadata)
    return file


@pytest.mark.parametrize("lost", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_text_encoder_without_one_of_its_files(lost: str, adapter: AdapterFiles, tmp_path: Path) -> None:
    format_named("peft").write(adapter, tmp_path)
    assert read_adapter(tmp_path).text_encoders.keys() == {"text_encoder"}
    (tmp_path / "text_encoder" / lost).unlink()
    with pytest.raises(UserError, match=rf"cannot read .*{lost}|{lost} does not exist; .* or copy it again$"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("name", ["diffusers", "kohya", "lycoris", "comfyui"])
def test_a_part_of_which_only_the_config_is_left(name: str, adapter: AdapterFiles, tmp_path: Path) -> None:
    one = format_named(name)
    one.write(adapter, tmp_path)
    file = tmp_path / one.file_name
    tensors = TensorFile.open(file).tensors
    rewritten(file, {key: value for key, value in tensors.items() if not key.startswith(("text_encoder", "lora_te"))})
    with pytest.raises(UserError, match="is incomplete: it holds no tensors of text_encoder"):
        read_adapter(file)


def test_layers_under_two_names(adapter: AdapterFiles, tmp_path: Path) -> None:
    format_named("kohya").write(adapter, tmp_path)
    file = tmp_path / "kohya.safetensors"
    tensors = dict(TensorFile.open(file).tensors)
    first = min(tensors)
    layer = first.partition(".")[0]
    other = layer.replace("lora_te_", "lora_te1_").replace("lora_unet_", "lora_transformer_")
    assert other != layer
    doubled = {key.replace(layer, other): value for key, value in tensors.items() if key.startswith(f"{layer}.")}
    rewritten(file, tensors | doubled)
    with pytest.raises(UserError, match=rf"holds the layer \S+ twice, as {layer} and {other}|as {other} and {layer}"):
        read_adapter(file)
    rewritten(file, {**tensors, f"{layer}.lora_A.weight": tensors[f"{layer}.lora_down.weight"]})
    with pytest.raises(UserError, match=f"holds lora_down.weight of {layer} under two names"):
        read_adapter(file)
    rewritten(file, {**tensors, f"{layer}.alpha": torch.ones(2)})
    with pytest.raises(UserError, match=rf"alpha of {layer} has the shape \(2,\)"):
        read_adapter(file)


def test_alphas(adapter: AdapterFiles, sd_folder: Path, tmp_path: Path) -> None:
    format_named("diffusers").write(adapter, tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = dict(TensorFile.open(file).tensors)
    rewritten(file, {**tensors, "unet.conv_out.alpha": torch.tensor(3.0)})
    with pytest.raises(UserError, match="has an alpha of conv_out, of which it holds no layer"):
        read_adapter(file)
    file.unlink()
    write_adapter(replace(adapter, config={**adapter.config, "alpha_pattern": {"to_q": float("nan")}}), tmp_path)
    with pytest.raises(UserError, match=r"has alpha_pattern\['to_q'\]=nan, which is no scale"):
        read_adapter(tmp_path)
    loha = adapter_for(sd_folder, LoHaConfig(r=2, alpha=3, target_modules=["to_q"]))
    format_named("lycoris").write(loha, tmp_path)
    file = tmp_path / "lycoris.safetensors"
    tensors = {
        key: 2 * value if key.endswith("alpha") else value for key, value in TensorFile.open(file).tensors.items()
    }
    assert read_adapter(rewritten(file, tensors)).config["alpha"] == 6  # the tensors are what other programs read


def test_an_encoder_with_both_names_of_a_layer(adapter: AdapterFiles, tmp_path: Path) -> None:
    format_named("diffusers").write(adapter, tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = TensorFile.open(file).tensors
    rewritten(file, {**tensors, **{key.replace(".text_model.", "."): value for key, value in tensors.items()}})
    with pytest.raises(UserError, match="with and without text_model"):
        read_adapter(file)


def test_records_without_a_hash(adapter: AdapterFiles) -> None:
    from lit_lora.formats.base_records import base_records

    record = {"name": "a", "path": "b", "weight": 1}
    with pytest.raises(UserError, match="is damaged"):
        base_records({"lit_lora.base_adapters": json.dumps([record])})


def test_factors_of_several_dtypes_and_without_scale() -> None:
    native = NativeLayer("qkv", ("q", "k", "v"))
    up = torch.full((4, 1), 1.001)
    parts = {
        "q": LoraFactors(torch.ones(1, 4, dtype=torch.bfloat16), torch.ones(4, 1, dtype=torch.bfloat16), 0.0),
        "k": LoraFactors(torch.full((1, 4), 2.0), up, 3.0),
    }
    fused = fuse(native, parts)
    delta = fused.alpha / fused.rank * fused.up @ fused.down
    expected = torch.cat([torch.zeros(4, 4), 3 * up @ parts["k"].down, torch.zeros(4, 4)])
    torch.testing.assert_close(delta, expected)
