"""Another VAE than the pipeline's: a folder with or without the subfolder, a file, or one that does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from lit_lora.errors import UserError
from lit_lora.families import ModelFamily, StableDiffusion
from lit_lora.module import LoraDiffusion
from lit_lora.planning.plan_run import plan_run
from tests.families.folders import FOLDERS

PLACES: dict[str, Callable[[Path], Path]] = {
    "pipeline": lambda folder: folder,
    "folder": lambda folder: folder / "vae",
    "file": lambda folder: folder / "vae" / "diffusion_pytorch_model.safetensors",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_vae_from_elsewhere(place: str, sd_folder: Path, sdxl_folder: Path) -> None:
    """That of the other pipeline has the same config."""
    family = StableDiffusion(str(sd_folder), vae=str(PLACES[place](sdxl_folder)))
    family.load(torch.float32, without={"text", "denoiser"})
    expected = load_file(PLACES["file"](sdxl_folder))
    assert family.vae.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in family.vae.state_dict().items())
    assert not any(parameter.requires_grad for parameter in family.vae.parameters())
    assert not family.vae.training


def test_a_cache_depends_on_it(sd_folder: Path, sdxl_folder: Path) -> None:
    def identity(vae: Path | None) -> dict[str, str]:
        return StableDiffusion(str(sd_folder), vae=None if vae is None else str(vae)).identity()

    own, theirs = identity(None), identity(sdxl_folder)
    assert own["text"] == theirs["text"]
    assert own["vae"] != theirs["vae"]
    assert identity(sdxl_folder / "vae") == theirs
    assert identity(sd_folder) == own
    files = [identity(PLACES["file"](folder))["vae"] for folder in (sd_folder, sdxl_folder)]
    assert len({*files, own["vae"], theirs["vae"]}) == 4  # the config of a file is the pipeline's


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_family_takes_one(kind: type[ModelFamily], request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(FOLDERS[kind])
    options: Any = {"vae": str(folder / "vae"), "config": "somewhere", "revision": "v1", "variant": "fp16"}
    source = kind(str(folder), **options).source
    assert {name: getattr(source, name) for name in options} == options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_channels": 16}, "its latent_channels is 16, and the denoiser was trained on .* with 4"),
        ({"scaling_factor": 0.13025}, "its scaling_factor is 0.13025, and .* with 0.5"),
        ({"shift_factor": 0.1}, "its shift_factor is 0.1, and .* with None"),
        ({"block_out_channels": [8, 16, 16]}, "its number of block_out_channels is 3, and .* with 2"),
    ],
)
def test_one_that_does_not_fit(change: dict[str, Any], message: str, sd_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sd_folder / "vae", tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    for weights in (tmp_path / "vae").glob("*.safetensors"):
        weights.unlink()  # nothing of it is read before the error
    with pytest.raises(UserError, match=f"vae='{tmp_path}/vae' does not fit {sd_folder}: {message}"):
        StableDiffusion(str(sd_folder), vae=str(tmp_path / "vae")).read_configs()


def test_a_file_of_another_shape(sd_folder: Path, tmp_path: Path) -> None:
    weights = load_file(PLACES["file"](sd_folder))
    weights["decoder.conv_in.weight"] = weights["decoder.conv_in.weight"][:, :2].contiguous()
    save_file(weights, tmp_path / "vae.safetensors")
    family = StableDiffusion(str(sd_folder), vae=str(tmp_path / "vae.safetensors"))
    with pytest.raises(
        UserError, match=r"decoder\.conv_in\.weight is \(16, 2, 3, 3\) in it and \(16, 4, 3, 3\) in the Autoenc"
    ):
        family.load(torch.float32, without={"text", "denoiser"})


def test_the_plan_counts_it(sd_folder: Path, tmp_path: Path) -> None:
    config = AutoencoderKL.load_config(sd_folder / "vae") | {"block_out_channels": [32, 64]}
    AutoencoderKL.from_config(config).save_pretrained(tmp_path / "vae")

    def peak(vae: str | None) -> int:
        family = StableDiffusion(str(sd_folder), vae=vae)
        module = LoraDiffusion(family, LoraConfig(r=2, target_modules=["to_q"]), base_dtype="float32")
        return plan_run(module, 1, 16, 16).peak

    assert peak(str(tmp_path / "vae")) > peak(None)


def test_a_folder_without_a_vae(sd_folder: Path) -> None:
    with pytest.raises(UserError, match=r"has neither config\.json nor vae/config\.json"):
        StableDiffusion(str(sd_folder), vae=str(sd_folder / "scheduler")).read_configs()
