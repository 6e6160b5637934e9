"""The contract of every family, and what is special to each."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

from lit_lora.draws import Draws
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily, StableDiffusion, StableDiffusionXL
from tests.helpers import make_batches

FOLDERS = {StableDiffusion: "sd_folder", StableDiffusionXL: "sdxl_folder"}


def test_every_family_is_under_contract() -> None:
    assert set(FOLDERS) == set(ModelFamily.__subclasses__())


@pytest.fixture(params=FOLDERS, ids=lambda c: c.__name__)
def family(request: pytest.FixtureRequest) -> ModelFamily:
    folder = request.getfixturevalue(FOLDERS[request.param])
    family: ModelFamily = request.param(str(folder))
    family.load(torch.float32)
    return family


def test_a_step_gives_gradients_to_the_adapter_alone(family: ModelFamily) -> None:
    family.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian"))
    batch = make_batches(1)[0]
    latents, conditioning = family.encode(batch, Draws(0, batch["slot"]))
    assert latents.shape == (2, 4, 8, 8)
    assert latents.dtype == torch.float32
    prediction = family.denoise(latents, torch.tensor([1, 999]), conditioning)
    assert prediction.shape == latents.shape
    prediction.square().mean().backward()
    with_gradient = {name for name, p in family.named_parameters() if p.grad is not None}
    assert with_gradient
    assert all("lora_" in name for name in with_gradient)


def test_floats_and_bytes_encode_alike(family: ModelFamily) -> None:
    batch = make_batches(1)[0]
    floats = {**batch, "pixel_values": batch["pixel_values"].float() / 127.5 - 1}
    draws = Draws(0, [0, 1])
    assert torch.equal(family.encode(batch, draws)[0], family.encode(floats, draws)[0])


def test_captions_matter(family: ModelFamily) -> None:
    batch = make_batches(1)[0]
    draws = Draws(0, [0, 1])
    _, one = family.encode(batch, draws)
    _, other = family.encode({**batch, "caption": ["", ""]}, draws)
    assert not torch.equal(one["encoder_hidden_states"], other["encoder_hidden_states"])


def test_encoders_stay_in_evaluation_mode(family: ModelFamily) -> None:
    family.train()
    assert family.denoiser.training
    assert not family.vae.training
    assert not family.encoders["text_encoder"].training


def test_block_classes_and_default_targets_exist(family: ModelFamily) -> None:
    found = {type(module).__name__ for module in family.denoiser.modules()}
    assert set(family.block_classes) <= found
    names = [name for name, _ in family.denoiser.named_modules()]
    for target in family.default_targets:
        assert any(name.endswith(target) for name in names)


def test_pipeline_draws_with_the_adapted_weights(family: ModelFamily) -> None:
    def draw() -> torch.Tensor:
        pipeline = family.pipeline()
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipeline("a star", num_inference_steps=2, generator=generator, output_type="np").images)

    before = draw()
    family.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False))
    assert not torch.allclose(before, draw())


def test_sdxl_conditioning_is_size_crop_and_target(sdxl_folder: Path) -> None:
    family = StableDiffusionXL(str(sdxl_folder))
    family.load(torch.float32)
    batch = make_batches(3)[2]
    _, conditioning = family.encode(batch, Draws(0, [0, 1]))
    assert conditioning["added_cond_kwargs"]["time_ids"].tolist() == [[22, 24, 1, 2, 16, 16]] * 2
    bare = {key: batch[key] for key in ("pixel_values", "caption")}
    _, conditioning = family.encode(bare, Draws(0, [0, 1]))
    assert conditioning["added_cond_kwargs"]["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2


def test_sdxl_keeps_its_vae_in_float32(sdxl_folder: Path) -> None:
    family = StableDiffusionXL(str(sdxl_folder))
    family.load(torch.bfloat16)
    assert family.vae.dtype == torch.float32
    assert family.denoiser.dtype == torch.bfloat16
    assert family.encoders["text_encoder_2"].dtype == torch.bfloat16


def test_a_folder_without_a_unet(sd_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(sd_folder, folder)
    shutil.rmtree(folder / "unet")
    with pytest.raises(UserError, match=r"has no folder 'unet'.*it holds .*text_encoder"):
        StableDiffusion(str(folder)).load(torch.float32)


def test_a_folder_with_a_broken_part(sd_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(sd_folder, folder)
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="cannot load 'unet'"):
        StableDiffusion(str(folder)).load(torch.float32)


def test_variant_files(sd_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sd_folder, tmp_path / "base")
    unet = UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet")
    for part in ("unet", "vae", "text_encoder"):
        for file in (tmp_path / "base" / part).glob("*.safetensors"):
            file.rename(file.with_suffix(".fp16.safetensors"))
    family = StableDiffusion(str(tmp_path / "base"), variant="fp16")
    family.load(torch.float32)
    assert torch.equal(family.denoiser.conv_in.weight, unet.conv_in.weight)
