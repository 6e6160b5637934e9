"""Bases that are not of the family's kind, and objectives that cannot train them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
from peft import LoraConfig

from lit_lora.cli import main
from lit_lora.errors import UserError
from lit_lora.families import (
    Flux,
    Flux2,
    ModelFamily,
    QwenImage,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    ZImage,
    check_size,
    family_of,
    prepare,
)
from lit_lora.objectives import DDPM, FlowMatching
from tests.tiny_pipelines import write_flux


def change(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def unet_with(channels: int) -> Callable[[Path], None]:
    return lambda folder: change(folder, "unet/config.json", in_channels=channels)


def scheduler(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder, "scheduler/scheduler_config.json", **values)


def pipeline(name: str) -> Callable[[Path], None]:
    return lambda folder: change(folder, "model_index.json", _class_name=name)


MISTAKES: dict[str, tuple[str, str, str | None, Callable[[Path], None], str]] = {
    # name: family, fixture of its folder, objective, what is changed in the folder, what the error says
    "flow base under DDPM": (
        "StableDiffusion3",
        "sd3_folder",
        "DDPM",
        lambda folder: None,
        r"objective DDPM cannot train StableDiffusion3 .*the scheduler is FlowMatchEulerDiscreteScheduler, and DDPM supports "
        r"DDIM.*FlowMatching, which is the default",
    ),
    "diffusion base under FlowMatching": (
        "StableDiffusion",
        "sd_folder",
        "FlowMatching",
        lambda folder: None,
        r"objective FlowMatching cannot train StableDiffusion .*the scheduler is DDIMScheduler",
    ),
    "unknown scheduler": (
        "StableDiffusion",
        "sd_folder",
        None,
        scheduler(_class_name="TomorrowsScheduler"),
        "objective DDPM cannot train StableDiffusion .*the scheduler is TomorrowsScheduler",
    ),
    "diffusion solver with flow sigmas": (
        "StableDiffusion",
        "sd_folder",
        None,
        scheduler(_class_name="DPMSolverMultistepScheduler", prediction_type="flow_prediction"),
        "DPMSolverMultistepScheduler is configured for flow matching",
    ),
    "SDXL as Stable Diffusion": (
        "StableDiffusion",
        "sdxl_folder",
        None,
        lambda folder: None,
        "StableDiffusion cannot train .* which is a StableDiffusionXLPipeline: use family StableDiffusionXL",
    ),
    "Stable Diffusion as SDXL": (
        "StableDiffusionXL",
        "sd_folder",
        None,
        lambda folder: None,
        "StableDiffusionXL cannot train .* which is a StableDiffusionPipeline: use family StableDiffusion",
    ),
    "FLUX.1 as Stable Diffusion 3": (
        "StableDiffusion3",
        "flux_folder",
        None,
        lambda folder: None,
        "StableDiffusion3 cannot train .* which is a FluxPipeline: use family Flux",
    ),
    "inpainting": (
        "StableDiffusion",
        "sd_folder",
        None,
        unet_with(9),
        "StableDiffusion cannot train the unet of .*takes 9 input channels, not 4, as models for inpainting",
    ),
    "instruct-pix2pix": (
        "StableDiffusionXL",
        "sdxl_folder",
        None,
        unet_with(8),
        "StableDiffusionXL cannot train the unet of .*takes 8 input channels, not 4",
    ),
    "inpainting pipeline of a UNet with 9 channels": (
        "StableDiffusion",
        "sd_folder",
        None,
        lambda folder: (pipeline("StableDiffusionInpaintPipeline")(folder), unet_with(9)(folder))[0],
        "takes 9 input channels, not 4",
    ),
    "FLUX.1 Fill": (
        "Flux",
        "flux_folder",
        None,
        pipeline("FluxFillPipeline"),
        "Flux cannot train .* which is a FluxFillPipeline: it takes images as inputs, .*such as .*FLUX.1-dev",
    ),
    "another denoiser": (
        "StableDiffusion",
        "sd_folder",
        None,
        lambda folder: change(folder, "unet/config.json", _class_name="UNet3DConditionModel"),
        "it is a UNet3DConditionModel, not a UNet2DConditionModel",
    ),
    "another VAE": (
        "StableDiffusion",
        "sd_folder",
        None,
        lambda folder: change(folder, "vae/config.json", _class_name="AutoencoderTiny"),
        "the VAE of .* it is a AutoencoderTiny, not a AutoencoderKL",
    ),
}


@pytest.mark.parametrize("command", ["fit", "plan", "cache"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_error_and_status_2(
    command: str,
    mistake: str,
    session_shards: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    family, fixture, objective, damage, message = MISTAKES[mistake]
    folder = tmp_path / "base"
    shutil.copytree(request.getfixturevalue(fixture), folder)
    damage(folder)
    for file in [*folder.rglob("*.safetensors")]:
        file.unlink()  # nothing of it is read before the error
    config: dict[str, Any] = {
        "trainer": {"max_steps": 1, "default_root_dir": str(tmp_path / "run"), "accelerator": "cpu"},
        "model": {
            "family": {"class_path": family, "init_args": {"pretrained_model_name_or_path": str(folder)}},
            "adapter": {"class_path": "LoraConfig", "init_args": {"r": 2, "lora_alpha": 2}},
        },
        "data": {
            "class_path": "WebDatasetDataModule",
            "init_args": {"train_shards": str(session_shards), "resolution": 16, "decoder": {"center_crop": True}},
        },
    }
    if objective:
        config["model"]["objective"] = {"class_path": objective}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    arguments = [command, "--config", str(path), *(["--out", str(tmp_path / "cache")] if command == "cache" else [])]
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("lit-lora: ") == 1
    assert "Traceback" not in error
    with pytest.raises(AssertionError, match=message):  # pytest's own way to search and to show
        raise AssertionError(error.replace("\n", " "))


FURTHER_INPUTS = {
    # kind of base: family, fixture of its folder, file, its changed entries, what the error says
    "SDXL refiner by its sizes": (
        StableDiffusionXL,
        "sdxl_folder",
        "unet/config.json",
        # As the published one: 2560 = 5 * 256 + 1280.
        {"projection_class_embeddings_input_dim": 2560, "cross_attention_dim": 1280, "addition_time_embed_dim": 256},
        r"the unet of .*it is a refiner, .*use the text-to-image model, such as stabilityai/stable-diffusion-xl-base-1.0",
    ),
    "SDXL refiner by its index": (
        StableDiffusionXL,
        "sdxl_folder",
        "model_index.json",
        {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True},
        "it is a refiner",
    ),
    "a UNet without sizes as SDXL": (
        StableDiffusionXL,
        "sdxl_folder",
        "unet/config.json",
        {"addition_embed_type": None},
        "it is not conditioned on image sizes",
    ),
    "unCLIP": (
        StableDiffusion,
        "sd_folder",
        "unet/config.json",
        {"class_embed_type": "projection"},
        "it is conditioned on classes, noise levels or an image .*such as stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
    "GLIGEN": (StableDiffusion, "sd_folder", "unet/config.json", {"attention_type": "gated"}, "conditioned on boxes"),
    "sizes in Stable Diffusion": (
        StableDiffusion,
        "sd_folder",
        "unet/config.json",
        {"addition_embed_type": "text_time"},
        "conditioned on more than the text",
    ),
    "Qwen-Image-Edit by its transformer": (
        QwenImage,
        "qwen_image_folder",
        "transformer/config.json",
        {"zero_cond_t": True},
        "it is for editing",
    ),
    "Qwen-Image-Layered": (
        QwenImage,
        "qwen_image_folder",
        "transformer/config.json",
        {"use_additional_t_cond": True},
        "it is for the layers of an image",
    ),
    "Z-Image-Omni": (
        ZImage,
        "z_image_folder",
        "transformer/config.json",
        {"siglip_feat_dim": 1152},
        "takes their SigLIP features",
    ),
}


@pytest.mark.parametrize("kind", FURTHER_INPUTS)
def test_bases_that_need_further_inputs(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    family, fixture, file, values, message = FURTHER_INPUTS[kind]
    shutil.copytree(request.getfixturevalue(fixture), tmp_path / "base")
    change(tmp_path / "base", file, **values)
    with pytest.raises(UserError, match=message):
        prepare(family(str(tmp_path / "base")), family.default_objective())


def test_the_pipeline_s_name_may_be_another_of_the_same_parts(sd_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(sd_folder, folder)
    pipeline("StableDiffusionImg2ImgPipeline")(folder)
    prepare(StableDiffusion(str(folder)), DDPM())
    (folder / "model_index.json").unlink()
    prepare(StableDiffusion(str(folder)), DDPM())


def test_a_distilled_base_warns_once(tmp_path: Path, tokenizer: Any, trainer_options: dict[str, Any]) -> None:
    from lit_lora.module import LoraDiffusion

    family = Flux(str(write_flux(tmp_path / "schnell", tokenizer, guidance=False)))
    module = LoraDiffusion(family, LoraConfig(r=2, lora_alpha=2), base_dtype="float32")
    with pytest.warns(UserWarning, match=r"is distilled to few steps.*train on black-forest-labs/FLUX.1-dev"):
        module.configure_model()
    module.configure_model()  # a warning would be an error


@pytest.mark.parametrize(
    ("family", "fixture", "part", "values", "base"),
    [
        (
            StableDiffusionXL,
            "sdxl_folder",
            "unet/config.json",
            {"time_cond_proj_dim": 256},
            "stable-diffusion-xl-base-1.0",
        ),
        (StableDiffusion, "sd_folder", "unet/config.json", {"time_cond_proj_dim": 256}, "stable-diffusion-v1-5"),
        (StableDiffusion, "sd_folder", "scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, "v1-5"),
        (
            StableDiffusionXL,
            "sdxl_folder",
            "scheduler/scheduler_config.json",
            {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
            "stable-diffusion-xl-base-1.0",
        ),
    ],
)
def test_what_makes_a_base_distilled(
    family: Any, fixture: str, part: str, values: dict[str, Any], base: str, tmp_path: Path, request: Any
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(request.getfixturevalue(fixture), folder)
    change(folder, part, **values)
    with pytest.warns(UserWarning, match=base):
        prepare(family(str(folder)), DDPM())


@pytest.mark.parametrize("name", ["stabilityai/sdxl-turbo", "ByteDance/SDXL-Lightning", "someone/my_LCM_model"])
def test_names_of_distilled_models(name: str, sdxl_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(sdxl_folder, folder)
    with pytest.warns(UserWarning, match="is distilled"):
        prepare(StableDiffusionXL(str(folder)), DDPM())


def test_schedules_that_end_in_noise_are_not_distilled(sdxl_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(sdxl_folder, folder)
    values = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    change(folder, "scheduler/scheduler_config.json", _class_name="EulerDiscreteScheduler", **values)
    prepare(StableDiffusionXL(str(folder)), DDPM())  # a warning would be an error


@pytest.mark.parametrize(
    ("family", "fixture"), [(Flux, "flux_folder"), (QwenImage, "qwen_image_folder"), (Flux2, "flux2_folder")]
)
def test_models_that_take_images_are_refused(
    family: type[ModelFamily], fixture: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Even where their denoisers have no further input channels."""
    folder = tmp_path / "base"
    shutil.copytree(request.getfixturevalue(fixture), folder)
    for name in family.image_pipelines:
        assert issubclass(getattr(diffusers, name), diffusers.DiffusionPipeline)
        pipeline(name)(folder)
        found = f"which is a {name}: it takes images as inputs.* use the text-to-image model, such as .*{family.undistilled}"
        with pytest.raises(UserError, match=found):
            prepare(family(str(folder)), FlowMatching())


def test_families_of_pipelines() -> None:
    assert family_of("StableDiffusion3Pipeline") is StableDiffusion3
    assert family_of("FluxPipeline") is Flux
    assert family_of("NoSuchPipeline") is None


def test_a_guidance_scale_that_the_base_does_not_take(tmp_path: Path, tokenizer: Any) -> None:
    folder = str(write_flux(tmp_path, tokenizer, guidance=False))
    Flux(folder).read_configs()
    with pytest.raises(UserError, match=r"train_guidance_scale=3\.5 has no effect, since .* takes no guidance scale"):
        Flux(folder, train_guidance_scale=3.5).read_configs()


def test_sizes(flux_folder: Path) -> None:
    family = Flux(str(flux_folder))
    family.read_configs()
    assert family.size_multiple == 4
    check_size(family, 16, 20)
    with pytest.raises(
        UserError, match=r"Flux takes images whose sides are multiples of 4 px, not 16 x 18.*16 x 16|16 x 20"
    ):
        check_size(family, 16, 18)
    prepare(family, FlowMatching())


def test_an_older_name_of_the_denoiser(sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(sd_folder, tmp_path / "base")
    change(tmp_path / "base", "unet/config.json", _class_name="UNetOfOldDays")
    with pytest.raises(UserError, match="it is a UNetOfOldDays, not a UNet2DConditionModel"):
        prepare(StableDiffusion(str(tmp_path / "base")), DDPM())
    monkeypatch.setattr(StableDiffusion, "older_denoisers", ("UNetOfOldDays",))
    prepare(StableDiffusion(str(tmp_path / "base")), DDPM())


def test_qwen_image_edit_without_its_index_by_its_processor(qwen_image_folder: Path, tmp_path: Path) -> None:
    """Its configs are those of Qwen-Image."""
    folder = tmp_path / "base"
    shutil.copytree(qwen_image_folder, folder)
    (folder / "processor").mkdir()
    prepare(QwenImage(str(folder)), FlowMatching())  # the index says what it is
    (folder / "model_index.json").unlink()
    with pytest.raises(UserError, match=r"cannot train the transformer of .*: it is for editing, Qwen-Image-Edit"):
        prepare(QwenImage(str(folder)), FlowMatching())
    (folder / "processor").rmdir()
    prepare(QwenImage(str(folder)), FlowMatching())
