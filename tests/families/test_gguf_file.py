"""Denoisers in GGUF files: each weight dequantized by itself, then stored as the run says."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from peft import LoraConfig
from safetensors.torch import load_file

from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion3
from lit_lora.families.gguf_file import open_gguf
from lit_lora.families.single_file import SingleFile
from lit_lora.module import LoraDiffusion
from lit_lora.planning.plan_run import plan_run
from lit_lora.quantization import Int8
from tests.families.single_files import write_single_file


def write_gguf(path: Path, tensors: dict[str, torch.Tensor], notes: dict[str, list[int]] | None = None) -> Path:
    """Matrices as Q8_0 where their rows are long enough, everything else as float16 or float32."""
    writer = gguf.GGUFWriter(path, "sd3")
    for name, shape in (notes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, Kind.Q8_0), raw_dtype=Kind.Q8_0)
        else:
            writer.add_tensor(name, values.astype("float16") if tensor.ndim == 2 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def weights(sd3_folder: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Those of a denoiser under its original names."""
    return load_file(write_single_file(tmp_path / "whole.safetensors", StableDiffusion3, sd3_folder, whole=False))


def test_a_denoiser(sd3_folder: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", weights)
    read, shown = open_gguf(file)
    assert {name: one.shape for name, one in shown.items()} == {name: one.shape for name, one in weights.items()}
    quantized = {name for name, one in weights.items() if one.ndim == 2 and one.shape[1] % 32 == 0}
    assert quantized
    for name, weight in weights.items():
        bound = weight.abs().max().item() / (127 if name in quantized else 1000)
        torch.testing.assert_close(read(name), weight.float(), rtol=0, atol=bound if weight.ndim == 2 else 0)
    family = StableDiffusion3(str(file), config=str(sd3_folder))
    family.load(torch.float32, without={"vae", "text"})
    expected = StableDiffusion3(str(sd3_folder))
    expected.load(torch.float32, without={"vae", "text"})
    for name, parameter in expected.denoiser.named_parameters():
        found = family.denoiser.get_parameter(name)
        assert 0 < (found - parameter).norm() <= parameter.norm() / 50 or torch.equal(found, parameter), name
    stored = StableDiffusion3(str(file), config=str(sd3_folder))
    stored.load(torch.bfloat16, without={"vae", "text"}, quantization=Int8())
    names = set(dict(stored.denoiser.named_parameters()))
    assert names != set(dict(expected.denoiser.named_parameters()))  # stored in the run's own quantization
    module = LoraDiffusion(StableDiffusion3(str(file), config=str(sd3_folder)), LoraConfig(r=2))
    plain = LoraDiffusion(StableDiffusion3(str(sd3_folder)), LoraConfig(r=2))
    assert plan_run(module, 1, 16, 16).peak == plan_run(plain, 1, 16, 16).peak


def test_shapes_of_more_dimensions_than_gguf_has(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", {"a": torch.arange(24.0).reshape(4, 6)}, {"a": [1, 2, 2, 3, 2]})
    read, shown = open_gguf(file)
    assert shown["a"].shape == (1, 2, 2, 3, 2)
    assert torch.equal(read("a").flatten(), torch.arange(24.0))


def test_a_damaged_file(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    data = write_gguf(tmp_path / "model.gguf", weights).read_bytes()
    for number, part in enumerate((data[:1000], b"GGUF" + bytes(100), b"", data[: len(data) // 2])):
        damaged = tmp_path / f"{number}.gguf"
        damaged.write_bytes(part)
        with pytest.raises(UserError, match=f"{number}.gguf is no GGUF file, or damaged"):
            SingleFile(damaged)


def test_without_the_package(weights: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "model.gguf", weights)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r'pip install "lit_lora\[gguf\]"'):
        SingleFile(file)
