"""The scheduler that an adapter was trained for goes with its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from lightning.pytorch import Trainer
from peft import LoraConfig
from PIL import Image

from lit_lora import DDPM, FromFile, LoraDiffusion, UserError
from lit_lora.cli import main
from lit_lora.families import StableDiffusion
from lit_lora.formats import TensorFile
from lit_lora.formats.find import read_adapter
from lit_lora.formats.learned_settings import changed_settings
from lit_lora.formats.sampling_scheduler import scheduler_changes, scheduler_metadata
from lit_lora.sampling import SamplingOptions
from tests.helpers import loader_of, make_batches

CHANGES = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SIZE = {"height": 16, "width": 16}


@pytest.fixture(scope="module")
def trained(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoraDiffusion, Path]:
    """A module after a step with a schedule that ends in noise, and its adapter's files."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    family = StableDiffusion(str(sd_folder))
    adapter = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"])
    objective = DDPM("v_prediction", zero_terminal_snr=True)
    sampling = SamplingOptions(2, 5.0, guidance_rescale=0.7)
    module = LoraDiffusion(family, adapter, objective, base_dtype="float32", sampling=sampling)
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    Trainer(max_steps=1, default_root_dir=folder, **options, **quiet).fit(module, loader_of(make_batches(1)))
    module.save_adapter(folder / "adapter", ["kohya"])
    return module, folder / "adapter"


def test_every_file_says_it(trained: tuple[LoraDiffusion, Path]) -> None:
    _, folder = trained
    for path in (folder, folder / "kohya.safetensors", folder / "pytorch_lora_weights.safetensors"):
        assert scheduler_changes(read_adapter(path).metadata) == CHANGES
    assert TensorFile.open(folder / "kohya.safetensors").metadata["ss_zero_terminal_snr"] == "True"
    line = "pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, prediction_type="
    assert line in (folder / "README.md").read_text()


def test_files_that_a_loop_without_a_trainer_saves_say_it_too(
    trained: tuple[LoraDiffusion, Path], sd_folder: Path, tmp_path: Path
) -> None:
    objective = DDPM("v_prediction", zero_terminal_snr=True)
    module = LoraDiffusion(StableDiffusion(str(sd_folder)), LoraConfig(r=2, target_modules=["to_q"]), objective)
    module.configure_model()
    module.save_adapter(tmp_path / "adapter")
    metadata = read_adapter(tmp_path / "adapter").metadata
    assert scheduler_changes(metadata) == CHANGES
    assert changed_settings(metadata, trained[0]) == []
    assert not metadata.keys() & {"ss_steps", "ss_optimizer"}


def test_images_are_those_of_diffusers_with_that_schedule(
    trained: tuple[LoraDiffusion, Path], sd_folder: Path, tmp_path: Path
) -> None:
    """In training, through the command, and through diffusers' pipeline with the settings written out."""
    module, folder = trained
    ours = module.generate(["a star"], [3], **SIZE)[0]
    pipeline: Any = StableDiffusionPipeline.from_pretrained(sd_folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **CHANGES)
    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "guidance_rescale": 0.7, **SIZE}
    theirs = pipeline("a star", generator=torch.Generator().manual_seed(3), **options).images[0]
    assert ours.tobytes() == theirs.tobytes()
    arguments = ["--seed", "3", "--steps", "2", "--height", "16", "--width", "16", "--device", "cpu"]
    arguments += ["--adapter", str(folder), "--prompts", "a star", "--out", str(tmp_path / "drawn")]
    assert main(["sample", *arguments, "--guidance_rescale", "0.7"]) == 0
    assert Image.open(tmp_path / "drawn" / "0000.png").tobytes() == ours.tobytes()
    plain = module.generate(["a star"], [3], guidance_rescale=0.0, **SIZE)[0]
    assert plain.tobytes() != ours.tobytes()


def test_a_training_that_goes_on_otherwise_tells_it(
    trained: tuple[LoraDiffusion, Path], sd_folder: Path, tmp_path: Path, trainer_options: dict[str, Any]
) -> None:
    def go_on(objective: DDPM, file: str = "", **options: Any) -> None:
        adapter = FromFile(path=str(trained[1] / file))
        family = StableDiffusion(str(sd_folder))
        module = LoraDiffusion(family, adapter, objective, base_dtype="float32", **options)
        Trainer(**trainer_options, max_steps=1).fit(module, loader_of(make_batches(1)))

    go_on(DDPM("v_prediction", zero_terminal_snr=True))  # a warning would be an error
    told = (
        r"trained otherwise: model\.caption_dropout 0 in the adapter, 0\.1 here; .*prediction_type v_prediction in the adapter, "
        r"epsilon here; model\.objective\.zero_terminal_snr True in the adapter, False here; .*"
        r"scheduler\.timestep_spacing trailing in the adapter, leading here.* Those of this training apply"
    )
    with pytest.warns(UserWarning, match=told):
        go_on(DDPM(), "kohya.safetensors", caption_dropout=0.1)


def test_adapters_of_other_programs_tell_their_prediction(sd_folder: Path) -> None:
    module = LoraDiffusion(StableDiffusion(str(sd_folder)), LoraConfig(r=2))
    module.configure_model()
    told = ["scheduler.prediction_type v_prediction in the adapter, epsilon here"]
    assert changed_settings({"modelspec.prediction_type": "v"}, module) == told
    assert changed_settings({"modelspec.prediction_type": "epsilon", "ss_steps": "3"}, module) == []
    for damaged in ("{", "[1]"):
        with pytest.raises(UserError, match="'ss_lit_lora_settings' is damaged"):
            changed_settings({"ss_lit_lora_settings": damaged}, module)


def test_a_base_s_own_scheduler_is_not_recorded() -> None:
    config = {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}
    assert scheduler_metadata(config, dict(config)) == {}
    assert scheduler_changes({}) == {}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{", "'lit_lora.scheduler' is damaged"),
        ("[1]", "'lit_lora.scheduler' is damaged"),
        (
            '{"_class_name": "StableDiffusionPipeline"}',
            "the scheduler 'StableDiffusionPipeline', which is not supported",
        ),
    ],
)
def test_damaged_entries(entry: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        scheduler_changes({"lit_lora.scheduler": entry})
