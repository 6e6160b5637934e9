"""Weights that bitsandbytes or torchao quantized before they were saved: restored one by one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from lit_lora.distributed.node import Node
from lit_lora.errors import UserError
from lit_lora.quantization import NF4, Dense
from lit_lora.quantization.frozen_layer import FrozenLayer
from lit_lora.quantization.load import load_model, load_part

DENOISER, ENCODER = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


def four_bit(name: str, weight: Tensor, kind: str, nested: bool) -> tuple[dict[str, Tensor], dict[str, str], Tensor]:
    """Tensors and metadata as ``save_pretrained`` writes them, and the weight that they stand for."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    data, state = quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=64)
    tensors = {name: data} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return tensors, {}, dequantize_4bit(data, state)


def eight_bit(name: str, weight: Tensor) -> tuple[dict[str, Tensor], dict[str, str], Tensor]:
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    data, scales, _ = int8_vectorwise_quant(weight.half())
    layer = name.removesuffix(".weight")
    tensors = {name: data, f"{layer}.SCB": scales, f"{layer}.weight_format": torch.zeros((), dtype=torch.uint8)}
    return tensors, {}, int8_vectorwise_dequant(data, scales)


def of_torchao(name: str, weight: Tensor, config: str) -> tuple[dict[str, Tensor], dict[str, str], Tensor]:
    from torchao import quantization
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight.data = weight
    quantization.quantize_(linear, getattr(quantization, config)())
    tensors, metadata = flatten_tensor_state_dict({name: linear.weight.detach()})
    return tensors, metadata, linear.weight.dequantize().detach()


METHODS: dict[str, Any] = {
    "NF4": ("bitsandbytes", lambda name, weight: four_bit(name, weight, "nf4", False)),
    "nested FP4": ("bitsandbytes", lambda name, weight: four_bit(name, weight, "fp4", True)),
    "LLM.int8": ("bitsandbytes", eight_bit),
    "int8 of torchao": ("torchao", lambda name, weight: of_torchao(name, weight, "Int8WeightOnlyConfig")),
    "fp8 of torchao": ("torchao", lambda name, weight: of_torchao(name, weight, "Float8WeightOnlyConfig")),
}


def saved(base: Path, folder: Path, file: str, layer: str, method: str) -> dict[str, Tensor]:
    """Copy a model with one quantized layer; returns the weights that it stands for."""
    shutil.copytree(base, folder)
    name, quantize = METHODS[method]
    weights = load_file(folder / file)
    tensors, metadata, restored = quantize(layer, weights[layer])
    save_file({key: value for key, value in weights.items() if key != layer} | tensors, folder / file, metadata)
    change_method(folder / file, name)
    return weights | {layer: restored}


def change_method(file: Path, method: str) -> None:
    path = file.parent / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}))


def load(folder: Path, quantization: Any = None) -> Any:
    return load_model(UNet2DConditionModel, str(folder), "unet", quantization or Dense(), torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_a_denoiser_is_restored(method: str, sd_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    expected = saved(sd_folder, tmp_path / "base", DENOISER, layer, method)
    with caplog.at_level("INFO"):
        found = load(tmp_path / "base").state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight.float(), msg=name)
    assert f"1 weights of {tmp_path / 'base' / 'unet'} were quantized by {METHODS[method][0]}" in caplog.text


def test_a_restored_weight_is_stored_in_the_run_s_quantization(sd_folder: Path, tmp_path: Path) -> None:
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    expected = saved(sd_folder, tmp_path / "base", DENOISER, layer, "LLM.int8")
    model = load(tmp_path / "base", NF4())
    found = model.get_submodule(layer.removesuffix(".weight"))
    assert isinstance(found, FrozenLayer)
    again = NF4()
    stored = again.quantize(expected[layer].float())
    torch.testing.assert_close(
        found.restored(torch.float32), again.dequantize(stored, expected[layer].shape, torch.float32)
    )


@pytest.mark.parametrize("method", ["NF4", "int8 of torchao"])
def test_a_text_encoder_is_restored(method: str, sd_folder: Path, tmp_path: Path) -> None:
    weights = load_file(sd_folder / ENCODER)
    layer = next(name for name in weights if name.endswith("layers.0.self_attn.q_proj.weight"))
    expected = saved(sd_folder, tmp_path / "base", ENCODER, layer, method)
    found = load_part(CLIPTextModel, str(tmp_path / "base"), "text_encoder", torch.float32, Node())
    theirs = CLIPTextModel.from_pretrained(sd_folder, subfolder="text_encoder").state_dict()
    changed = [name for name, weight in found.state_dict().items() if not torch.equal(weight, theirs[name])]
    assert len(changed) == 1
    torch.testing.assert_close(found.state_dict()[changed[0]], expected[layer].float())


def test_methods_that_cannot_be_read(sd_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sd_folder, tmp_path / "base")
    change_method(tmp_path / "base" / DENOISER, "nunchaku")
    message = r"were quantized by nunchaku .*only those of bitsandbytes and torchao can be read; name the model in bf16"
    with pytest.raises(UserError, match=message):
        load(tmp_path / "base")
    change_method(tmp_path / "base" / "vae" / "model", "bitsandbytes")
    with pytest.raises(UserError, match=r"read for denoisers and text encoders; set vae to the same VAE in bf16"):
        load_part(AutoencoderKL, str(tmp_path / "base"), "vae", torch.float32, Node())
    change_method(tmp_path / "base" / DENOISER, "torchao")
    torch.save({}, tmp_path / "base" / "unet" / "diffusion_pytorch_model.bin")
    (tmp_path / "base" / DENOISER).unlink()
    with pytest.raises(UserError, match="holds pickled classes of torchao"):
        load(tmp_path / "base")


def test_another_layout_of_eight_bit_weights(sd_folder: Path, tmp_path: Path) -> None:
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    saved(sd_folder, tmp_path / "base", DENOISER, layer, "LLM.int8")
    tensors = load_file(tmp_path / "base" / DENOISER)
    tensors[f"{layer}_format"] = torch.ones((), dtype=torch.uint8)
    save_file(tensors, tmp_path / "base" / DENOISER)
    with pytest.raises(UserError, match="layout 1 of bitsandbytes' 8-bit weights"):
        load(tmp_path / "base")
