"""Which pipeline a base has, and what its constructor gets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from lit_lora.families import StableDiffusion, StableDiffusionXL, family_of, prepare
from lit_lora.objectives import DDPM


def changed(folder: Path, to: Path, **values: Any) -> str:
    """A copy of a base with other values in its ``model_index.json``."""
    shutil.copytree(folder, to)
    index = to / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | values))
    return str(to)


def test_a_family_of_two_pipelines(sd_folder: Path, tmp_path: Path) -> None:
    class Two(StableDiffusion):
        other_pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]] = (StableDiffusionImg2ImgPipeline,)

    other = Two(changed(sd_folder, tmp_path / "base", _class_name="StableDiffusionImg2ImgPipeline"))
    assert family_of("StableDiffusionImg2ImgPipeline") is Two
    prepare(other, DDPM())
    other.load(torch.float32)
    assert type(other.pipeline()) is StableDiffusionImg2ImgPipeline
    for folder in (str(sd_folder), changed(sd_folder, tmp_path / "unknown", _class_name="NoPipeline")):
        assert Two(folder).base_pipeline is StableDiffusionPipeline


def test_the_bases_options_reach_the_pipeline(sdxl_folder: Path, tmp_path: Path) -> None:
    options = {"force_zeros_for_empty_prompt": False, "add_watermarker": True, "not_an_option": 1}
    family = StableDiffusionXL(changed(sdxl_folder, tmp_path / "base", **options))
    assert family.base_options == {"force_zeros_for_empty_prompt": False, "add_watermarker": False}
    family.load(torch.float32)
    assert family.pipeline().config["force_zeros_for_empty_prompt"] is False
