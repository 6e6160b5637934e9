"""Training goes on with a saved adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoHaConfig, LoraConfig, PeftConfig

from lit_lora import AdapterCheckpoint, FromFile, LoraDiffusion, UserError
from lit_lora.adapters import adapter_state
from lit_lora.families import Flux, StableDiffusion
from lit_lora.formats import AdapterFiles, format_named, write_adapter
from lit_lora.formats.find import read_adapter
from lit_lora.planning.changes import _half_rank
from lit_lora.planning.plan_run import plan
from lit_lora.planning.run import Run
from tests.formats.adapters import encoder_adapter, loaded, trained
from tests.helpers import loader_of, make_batches

CONFIG = {"r": 2, "lora_alpha": 3, "rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_v": 5}}


def saved(config: PeftConfig, sd_folder: Path, folder: Path, formats: tuple[str, ...] = ()) -> AdapterFiles:
    adapter = trained(loaded(StableDiffusion, sd_folder), config)
    folder.mkdir(exist_ok=True)
    write_adapter(adapter, folder, formats)
    return adapter


def module_from(path: Path, sd_folder: Path, **options: Any) -> LoraDiffusion:
    return LoraDiffusion(StableDiffusion(str(sd_folder)), FromFile(path=str(path), **options), base_dtype="float32")


@pytest.mark.parametrize("file", ["", "pytorch_lora_weights.safetensors", "kohya.safetensors", "lycoris.safetensors"])
def test_values_ranks_and_alphas_are_the_files(file: str, sd_folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["to_q", "to_v"], **CONFIG)
    adapter = saved(config, sd_folder, tmp_path / "first", ("kohya", "lycoris"))
    module = module_from(tmp_path / "first" / file, sd_folder)
    module.configure_model()
    state = adapter_state(module.family.denoiser)
    assert state.keys() == adapter.state.keys()
    assert all(torch.equal(value, adapter.state[name]) for name, value in state.items())
    scales = {
        name: layer.scaling["default"]
        for name, layer in module.family.denoiser.named_modules()
        if hasattr(layer, "scaling")
    }
    assert {1.0, 2.5} == set(scales.values())  # 3 / 3 for to_q and 5 / 2 for to_v
    assert all(parameter.requires_grad for name, parameter in module.named_parameters() if "lora_" in name)


def test_training_goes_on_and_is_saved_and_resumed(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    adapter = saved(LoHaConfig(r=2, alpha=2), sd_folder, tmp_path / "first")
    options = trainer_options | {"max_epochs": None, "enable_checkpointing": True}
    batches = make_batches(4)

    def fit(steps: int, folder: str, first: int = 0, ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
        module = module_from(tmp_path / "first", sd_folder)
        checkpoint = AdapterCheckpoint(tmp_path / folder, save_last=True)
        trainer = Trainer(**options, max_steps=steps, callbacks=[checkpoint])
        trainer.fit(module, loader_of(batches[first:] + batches[:first]), ckpt_path=ckpt_path)
        return dict(read_adapter(Path(checkpoint.last_model_path).with_suffix(".adapter")).state)

    whole = fit(4, "whole")
    assert not any(torch.equal(value, adapter.state[name]) for name, value in whole.items() if "w2_b" in name)
    fit(2, "parts")
    resumed = fit(4, "parts", 2, tmp_path / "parts" / "last.ckpt")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_sharded_loading_starts_with_the_files_values(sd_folder: Path, tmp_path: Path) -> None:
    """DoRA's magnitudes too, which would otherwise be taken from the base."""
    adapter = saved(LoraConfig(r=2, use_dora=True, target_modules=["to_q"]), sd_folder, tmp_path / "first")
    family = StableDiffusion(str(sd_folder))
    family.load(torch.float32, without=("vae", "text", "denoiser"))
    file = FromFile(path=str(tmp_path / "first"))
    family.load_adapted(file.config(StableDiffusion), lambda part: None, file.start)
    state = adapter_state(family.denoiser)
    assert all(torch.equal(value, state[name]) for name, value in adapter.state.items())


def test_text_encoders_are_not_lost_silently(sd_folder: Path, tmp_path: Path) -> None:
    adapter = saved(LoraConfig(r=2), sd_folder, tmp_path / "first")
    adapter = replace(adapter, text_encoders={"text_encoder": encoder_adapter()})
    format_named("kohya").write(adapter, tmp_path)
    module = module_from(tmp_path / "kohya.safetensors", sd_folder)
    module.configure_model()
    assert module.family.trained_encoders == ("text_encoder",)
    dropped = module_from(tmp_path / "kohya.safetensors", sd_folder, drop_text_encoders=True)
    dropped.configure_model()
    assert dropped.family.trained_encoders == ()
    alone = replace(adapter, state={}, text_encoders=adapter.text_encoders)
    format_named("kohya").write(alone, tmp_path)
    with pytest.raises(UserError, match="changes text encoders or has new tokens alone, and drop_text_encoders"):
        module_from(tmp_path / "kohya.safetensors", sd_folder, drop_text_encoders=True)


def test_text_encoders_that_cannot_be_trained(flux_folder: Path, tmp_path: Path) -> None:
    adapter = trained(loaded(Flux, flux_folder), LoraConfig(r=2, target_modules=["to_q"]))
    other = encoder_adapter(32, "encoder.block.0.layer.0.SelfAttention.q")
    other = replace(other, state={name.replace("text_model.", ""): value for name, value in other.state.items()})
    format_named("kohya").write(replace(adapter, text_encoders={"text_encoder_2": other}), tmp_path)
    path = str(tmp_path / "kohya.safetensors")
    with pytest.raises(
        UserError, match=r"changes text_encoder_2, which cannot be trained in Flux.* drop_text_encoders"
    ):
        LoraDiffusion(Flux(str(flux_folder)), FromFile(path=path))
    LoraDiffusion(Flux(str(flux_folder)), FromFile(path=path, drop_text_encoders=True))


def test_what_cannot_be_continued(sd_folder: Path, flux_folder: Path, tmp_path: Path) -> None:
    adapter = saved(LoraConfig(r=2), sd_folder, tmp_path / "first")
    with pytest.raises(UserError, match="needs a path"):
        FromFile()
    with pytest.raises(UserError, match=r"nowhere.* does not exist; name a"):
        module_from(tmp_path / "nowhere", sd_folder)
    with pytest.raises(UserError, match="holds an adapter of a unet, not of a transformer"):
        LoraDiffusion(
            Flux(str(flux_folder)), FromFile(path=str(tmp_path / "first" / "pytorch_lora_weights.safetensors"))
        )
    incomplete = dict(sorted(adapter.state.items())[2:])
    write_adapter(replace(adapter, state=incomplete), tmp_path / "first")
    with pytest.raises(UserError, match="misses 2 tensors"):
        module_from(tmp_path / "first", sd_folder).configure_model()
    large = {
        name: torch.ones(2000, *value.shape[1:]) if "lora_A" in name else torch.ones(len(value), 2000, *value.shape[2:])
        for name, value in adapter.state.items()
    }
    write_adapter(replace(adapter, state=large, config={**adapter.config, "r": 2000}), tmp_path / "first")
    with pytest.raises(UserError, match="r=2000 is too large for"):
        module_from(tmp_path / "first", sd_folder).configure_model()


def test_a_plan_knows_the_ranks_and_does_not_change_them(sd_folder: Path, tmp_path: Path) -> None:
    adapter = saved(LoraConfig(r=8), sd_folder, tmp_path / "first")
    run = Run(module_from(tmp_path / "first", sd_folder), 2, 32, 32)
    assert plan(run).adapter_parameters == sum(value.numel() for value in adapter.state.values())
    assert _half_rank(run) is None
