from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from lit_lora.callbacks import AdapterCheckpoint, AdapterEMA, LoraInjection, RankBudget
from lit_lora.datamodules import Chunks, ImageDecoder, WebDatasetDataModule
from lit_lora.described import described
from lit_lora.families import Flux, StableDiffusion
from lit_lora.formats.learned_settings import learned_settings
from lit_lora.memory.options import MemoryOptions
from lit_lora.module import LoraDiffusion
from lit_lora.objectives import DDPM, FlowMatching, MinSNR, PseudoHuber
from lit_lora.quantization import NF4, Int8
from tests.helpers import Classifier, loader_of, make_batches

CHANGES: Mapping[str, tuple[dict[str, Any], str]] = {
    "base_dtype": ({"base_dtype": "bfloat16"}, r"model\.base_dtype float32 in the checkpoint, bfloat16 here"),
    "quantization": (
        {"quantization": NF4(block_size=32)},
        r"quantization Dense in the checkpoint, NF4\(block_size=32, double_quant=True, skip=\[\]\) here",
    ),
    "objective": (
        {"objective": DDPM(weighting=MinSNR(), timestep_range=(0.0, 0.5))},
        r"weighting None in the checkpoint, MinSNR\(gamma=5\) here; .*timestep_range \[0, 1\] in the checkpoint, \[0, 0.5\]",
    ),
    "memory": (
        {"memory": MemoryOptions(vae_tiling=True, text_encoder_quantization=NF4(block_size=32))},
        r"vae_tiling False in the checkpoint, True here; model\.memory\.text_encoder_quantization None in the checkpoint, NF4",
    ),
    "optimizer_in_backward": (
        {"memory": MemoryOptions(optimizer_in_backward=True)},
        r"model\.memory\.optimizer_in_backward False in the checkpoint, True here",
    ),
    "caption_dropout": ({"caption_dropout": 0.1}, r"caption_dropout 0 in the checkpoint, 0\.1 here"),
    "adapter": (
        {"adapter": LoraConfig(r=2, lora_alpha=2, lora_dropout=0.5, target_modules=["to_q"])},
        r"lora_dropout of family\.denoiser\.default 0 in the checkpoint, 0\.5 here\. Those of this run apply; set them",
    ),
}


def fit(module: Any, options: dict[str, Any], folder: Path, steps: int = 1, **more: Any) -> Trainer:
    resume = more.pop("resume", None)
    saving = AdapterCheckpoint(folder, save_last=True, save_top_k=0, enable_version_counter=False)
    options = options | {"max_steps": steps, "enable_checkpointing": True} | more
    trainer = Trainer(**options | {"callbacks": [*more.get("callbacks", []), saving]})
    trainer.fit(module, loader_of(make_batches(2)), ckpt_path=resume)
    return trainer


def diffusion(base: Path, **options: Any) -> LoraDiffusion:
    options = {"adapter": LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"]), "base_dtype": "float32"} | options
    return LoraDiffusion(StableDiffusion(str(base)), **options)


@pytest.mark.parametrize("name", CHANGES)
def test_a_resumed_run_tells_what_it_does_otherwise(
    name: str, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    options, told = CHANGES[name]
    fit(diffusion(sd_folder), trainer_options, tmp_path)
    with pytest.warns(UserWarning, match=told):
        fit(diffusion(sd_folder, **options), trainer_options, tmp_path, 2, resume=tmp_path / "last.ckpt")


def test_accumulation_of_a_plain_loader_is_compared(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    fit(diffusion(sd_folder), trainer_options, tmp_path)
    with pytest.warns(
        UserWarning,
        match=r"batches in an optimizer step 1 \(1 process x 1 batch\) in the checkpoint, 2 \(1 process x 2 batches\) here",
    ):
        fit(
            diffusion(sd_folder),
            trainer_options,
            tmp_path,
            2,
            accumulate_grad_batches=2,
            resume=tmp_path / "last.ckpt",
        )


def test_what_samples_are_is_compared(
    sd_folder: Path, session_shards: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    def run(steps: int, resume: Path | None = None, **options: Any) -> None:
        more: dict[str, Any] = {"chunks": Chunks(passes=options.pop("passes", 1)), "val_samples": 2, "num_workers": 0}
        of_run = {"max_steps": steps, "overfit_batches": options.pop("overfit_batches", 0)}
        decoder = ImageDecoder(center_crop=True, **options)
        data = WebDatasetDataModule(str(session_shards), decoder=decoder, resolution=16, **more)
        saving = AdapterCheckpoint(tmp_path, save_last=True, save_top_k=0, enable_version_counter=False)
        options = trainer_options | {"enable_checkpointing": True, "callbacks": [saving], "val_check_interval": 1}
        trainer = Trainer(**options | of_run)
        trainer.fit(diffusion(sd_folder), data, ckpt_path=resume)

    run(1)
    run(2, tmp_path / "last.ckpt")  # a warning would be an error
    told = r"decoder\.random_flip False in the checkpoint, True here; data\.decoder\.mask None in the checkpoint, alpha here"
    with pytest.warns(UserWarning, match=told):
        run(3, tmp_path / "last.ckpt", random_flip=True, mask="alpha")
    told = r"overfit_batches 0 in the checkpoint, 2 here; data\.chunks\.passes 1 in the checkpoint, 2 here"
    with pytest.warns(UserWarning, match=told):
        run(4, tmp_path / "last.ckpt", random_flip=True, mask="alpha", passes=2, overfit_batches=2)


def test_options_of_the_family_are_compared() -> None:
    module = LoraDiffusion(Flux("base", train_guidance_scale=3.5, variant="fp16"), LoraConfig(r=2), FlowMatching())
    settings = learned_settings(module)
    assert settings["model.family.train_guidance_scale"] == "3.5"
    assert settings["model.family.max_sequence_length"] == "512"
    assert settings["model.objective"] == "FlowMatching"
    assert settings["model.objective.shift"] == "None"
    assert not any(
        "variant" in name or "pretrained" in name for name in settings
    )  # the base's parts are compared themselves


def test_a_resumed_run_tells_of_another_base(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    fit(diffusion(sd_folder), trainer_options, tmp_path)
    last = tmp_path / "last.ckpt"
    moved = Path(shutil.copytree(sd_folder, tmp_path / "moved"))
    fit(diffusion(moved), trainer_options, tmp_path, 2, resume=last)  # the same weights elsewhere
    weights = moved / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1e-3 for name, value in load_file(weights).items()}, weights)
    told = (
        rf"the base's denoiser {moved} \(blake2b:\w+\) in the checkpoint, {moved} \(blake2b:\w+\) here\. Those of this"
    )
    with pytest.warns(UserWarning, match=told):
        trainer = fit(diffusion(moved), trainer_options, tmp_path, 3, resume=last)
    with pytest.warns(UserWarning, match=rf"the base's denoiser {moved} .* in the checkpoint, {sd_folder} "):
        trainer.validate(diffusion(sd_folder), loader_of(make_batches(1)), ckpt_path=last, verbose=False)


def test_another_schedule_of_the_base_is_told(
    shallow_sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(shallow_sd_folder, tmp_path / "base"))
    fit(diffusion(base), trainer_options, tmp_path)
    file = base / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.02, "_diffusers_version": "0.1"}))
    last = tmp_path / "last.ckpt"
    told = r"checkpoint was made with: the base's scheduler.beta_end 0.012 in the checkpoint, 0.02 here. Those"
    with pytest.warns(UserWarning, match=told):
        trainer = fit(diffusion(base), trainer_options, tmp_path, 1, resume=last)
    with pytest.warns(UserWarning, match=told):
        trainer.validate(diffusion(base), loader_of(make_batches(1)), ckpt_path=last, verbose=False)


def test_validation_tells_of_what_changes_its_result(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def validate(**options: Any) -> None:
        batches = loader_of(make_batches(1))
        trainer.validate(diffusion(sd_folder, **options), batches, ckpt_path=tmp_path / "last.ckpt", verbose=False)

    trainer = fit(diffusion(sd_folder), trainer_options, tmp_path)
    validate(seed=3, caption_dropout=0.5, memory=MemoryOptions(optimizer_in_backward=True))  # of training alone
    assert not [one for one in recwarn if "is not what" in str(one.message)]
    with pytest.warns(UserWarning, match=r"prediction_type epsilon in the checkpoint, v_prediction here"):
        validate(objective=DDPM(prediction_type="v_prediction"))


def test_what_callbacks_and_the_trainer_do_otherwise(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    def run(share: float, decay: float, quantized: bool, **more: Any) -> None:
        config = LoraConfig(r=2, lora_alpha=2, target_modules=["3"])
        injection = LoraInjection(config, quantization=Int8() if quantized else None)
        callbacks = [injection, RankBudget(share=share), AdapterEMA(decay)]
        fit(Classifier(), trainer_options, tmp_path, callbacks=callbacks, **more)

    run(0.5, 0.9, False, steps=2)
    told = (
        r"gradient_clip_val 0 in the checkpoint, 0\.5 here; quantization of LoraInjection None in the checkpoint, "
        r"Int8\(.*\) here; share of RankBudget 0\.5 in the checkpoint, 0\.75 here"
    )
    with (
        pytest.warns(UserWarning, match=told),
        pytest.warns(UserWarning, match=r"decay of AdapterEMA is 0\.9 in the checkpoint and 0\.5 here, which applies"),
        pytest.warns(
            UserWarning, match=r"RankBudget keeps the schedule of its checkpoint, which is made for 2 optimizer"
        ),
    ):
        run(0.75, 0.5, True, steps=3, gradient_clip_val=0.5, resume=tmp_path / "last.ckpt")


class Deeper(Classifier):
    """The classifier with another base: a frozen layer more, or other values."""

    def __init__(self, layers: int = 0, values: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(*self.net, *(nn.Linear(4, 4) for _ in range(layers)))
        with torch.no_grad():
            self.net[0].weight += values  # type: ignore[operator]


@pytest.mark.parametrize(
    ("saved", "here", "told"),
    [
        (
            {},
            {"values": 1e-3},
            r"made with: 1 weights of the base have other values .* here, such as net\.0\.weight\. Those",
        ),
        ({}, {"layers": 1}, r"made with: 2 weights of the base are new here, such as net\.4\.bias\. Those"),
        ({"layers": 1}, {}, r"made with: 2 weights of the base are not here, such as net\.4\.bias\. Those"),
        ({}, {}, None),
    ],
)
def test_another_base_of_a_module_of_another_project(
    saved: dict[str, Any],
    here: dict[str, Any],
    told: str | None,
    trainer_options: dict[str, Any],
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    def run(options: dict[str, Any], steps: int, resume: Path | None = None) -> Trainer:
        injection = LoraInjection(LoraConfig(r=2, lora_alpha=2, target_modules=["3"]))
        return fit(Deeper(**options), trainer_options, tmp_path, steps, callbacks=[injection], resume=resume)

    run(saved, 1)
    last = tmp_path / "last.ckpt"
    if told is None:
        run(here, 2, last)
        assert not [one for one in recwarn if "is not what" in str(one.message)]
        return
    with pytest.warns(UserWarning, match=told):
        run(here, 2, last)


def test_equal_settings_have_equal_texts() -> None:
    class Own:
        def __init__(self, scale: float, hidden: int) -> None:
            self.scale = scale

    assert described((0, 1.0)) == described([0.0, 1]) == "[0, 1]"
    assert described({"a": torch.float16, "b": None, "c": True}) == "{a: float16, b: None, c: True}"
    assert described(PseudoHuber(0.25)) == "PseudoHuber(c=0.25)"
    assert described(123_456_789) == "123456789"
    assert described(Own(2.5, 1)) == "Own(scale=2.5)"
    assert described(object()) == "object"
    assert described(described) == "function"


class Validated(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx), batch_size=2)


def test_other_validation_samples_are_told(
    make_shards: Callable[..., list[Path]], trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    """The checkpoint's best score and early stopping are those of the samples before."""

    def fit_over(validation: str, steps: int, resume: Path | None = None) -> None:
        data = WebDatasetDataModule(str(tmp_path / "shards"), validation, batch_size=2, resolution=16, num_workers=0)
        saving = AdapterCheckpoint(tmp_path / "saved", save_last=True, enable_version_counter=False)
        options = trainer_options | {"max_steps": steps, "enable_checkpointing": True, "callbacks": [saving]}
        Trainer(**options).fit(Validated(), data, ckpt_path=resume)

    make_shards(6)
    for folder, count in (("four", 4), ("five", 5)):
        make_shards(count, folder=folder)
    shutil.copytree(tmp_path / "four", tmp_path / "moved")
    fit_over(str(tmp_path / "four"), 1)
    fit_over(str(tmp_path / "moved"), 2, tmp_path / "saved" / "last.ckpt")  # warnings are errors
    told = r"validation samples, on which best scores and early stopping depend, 4 \(\w{8}\) in the checkpoint, 5 \(\w{8}\) here"
    with pytest.warns(UserWarning, match=told):
        fit_over(str(tmp_path / "five"), 3, tmp_path / "saved" / "last.ckpt")
