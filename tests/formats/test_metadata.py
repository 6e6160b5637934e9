"""Metadata of adapter files and model cards hold what is known, and nothing else."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from lightning.pytorch import Trainer
from peft import LoHaConfig, LoraConfig

from lit_lora import AdapterCheckpoint, AdapterInfo, LoraDiffusion, UserError
from lit_lora.adapters.parameter_groups import ParameterGroup
from lit_lora.families import Flux, StableDiffusion
from lit_lora.formats import TensorFile, format_named, write_adapter
from lit_lora.formats.base_options import loading_lines
from lit_lora.formats.find import read_adapter
from tests.formats.adapters import loaded, trained
from tests.formats.test_formats import same
from tests.helpers import loader_of, make_batches

INFO = AdapterInfo(title="Seven", trigger_words=["a red seven", "svn"], author="A", license="openrail", tags=["digits"])


@pytest.mark.parametrize("name", ["kohya", "comfyui", "lycoris"])
def test_metadata_of_layer_files(name: str, flux_folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"])
    adapter = replace(trained(loaded(Flux, flux_folder), config), metadata={"ss_steps": "12", **INFO.metadata})
    one = format_named(name)
    one.write(adapter, tmp_path)
    file = TensorFile.open(tmp_path / one.file_name)
    expected = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "flux-1-dev/lora",
        "modelspec.title": "Seven",
        "modelspec.trigger_phrase": "a red seven, svn",
        "modelspec.author": "A",
        "ss_base_model_version": "flux1",
        "ss_network_dim": "2",
        "ss_network_alpha": "4",
        "ss_sd_model_name": flux_folder.name,
        "ss_steps": "12",
        "ss_network_module": "lycoris.kohya" if name == "lycoris" else "networks.lora_flux",
    }
    assert file.metadata.items() >= expected.items()
    content = file.path.read_bytes()
    data = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert (file.metadata["modelspec.hash_sha256"], file.metadata["sshs_model_hash"]) == (f"0x{data}", data)
    assert read_adapter(file.path).metadata.items() >= adapter.metadata.items()
    assert "sshs_model_hash" not in read_adapter(file.path).metadata  # it is the file's, not the adapter's


def test_ranks_that_differ_and_other_methods(sd_folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["to_q", "to_k"], rank_pattern={"to_q": 4})
    format_named("kohya").write(trained(loaded(StableDiffusion, sd_folder), config), tmp_path)
    metadata = TensorFile.open(tmp_path / "kohya.safetensors").metadata
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("Dynamic", "8")
    assert metadata["modelspec.title"] == f"{sd_folder.name} LoRA"
    loha = trained(loaded(StableDiffusion, sd_folder), LoHaConfig(r=2, alpha=3, target_modules=["to_q"]))
    format_named("lycoris").write(loha, tmp_path)
    metadata = TensorFile.open(tmp_path / "lycoris.safetensors").metadata
    assert json.loads(metadata["ss_network_args"]) == {"algo": "loha"}
    assert metadata["ss_network_alpha"] == "3"


def test_a_run_tells_its_facts(sd_module: LoraDiffusion, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    """The learning rate is that of the parameters without one of their own."""
    sd_module.parameter_groups = (ParameterGroup("*.lora_B.*", lr_ratio=8),)
    trainer = Trainer(**trainer_options | {"max_steps": 3, "max_epochs": None}, accumulate_grad_batches=2)
    trainer.fit(sd_module, loader_of(make_batches(6)))
    sd_module.save_adapter(tmp_path / "adapter", ["kohya"], INFO)
    told = read_adapter(tmp_path / "adapter").metadata
    expected = {
        "ss_steps": "3",
        "ss_max_train_steps": "3",
        "ss_gradient_accumulation_steps": "2",
        "ss_optimizer": "torch.optim.adamw.AdamW",
        "ss_learning_rate": "0.0001",
        "ss_seed": "0",
        "ss_mixed_precision": "no",
        "modelspec.trigger_phrase": "a red seven, svn",
    }
    assert told.items() >= expected.items()
    assert TensorFile.open(tmp_path / "adapter" / "kohya.safetensors").metadata.items() >= expected.items()
    assert (
        TensorFile.open(tmp_path / "adapter" / "pytorch_lora_weights.safetensors").metadata.items() >= expected.items()
    )


def test_a_checkpoint_in_further_formats(
    sd_module: LoraDiffusion, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = AdapterCheckpoint(tmp_path / "ck", save_last=True, formats=["kohya", "comfyui"], info=INFO)
    options = trainer_options | {"max_steps": 2, "max_epochs": None, "enable_checkpointing": True}
    Trainer(**options, callbacks=[checkpoint]).fit(sd_module, loader_of(make_batches(2)))
    folder = tmp_path / "ck" / "last.adapter"
    assert {"kohya.safetensors", "comfyui.safetensors", "README.md"} <= {path.name for path in folder.iterdir()}
    for name in ("kohya.safetensors", "comfyui.safetensors"):
        same(read_adapter(folder / name), read_adapter(folder))
        assert read_adapter(folder / name).metadata["modelspec.trigger_phrase"] == "a red seven, svn"


def test_formats_are_checked_before_training(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="format 'cohya' is not known"):
        AdapterCheckpoint(tmp_path, formats=["cohya"])
    module = LoraDiffusion(StableDiffusion(str(sd_folder)), LoHaConfig(r=2, alpha=2), base_dtype="float32")
    checkpoint = AdapterCheckpoint(tmp_path / "ck", formats=["kohya"])
    options = trainer_options | {"max_steps": 2, "max_epochs": None, "enable_checkpointing": True}
    with pytest.raises(UserError, match="in the format kohya: it holds LoRA, and this is LOHA; leave kohya out"):
        Trainer(**options, callbacks=[checkpoint]).fit(module, loader_of(make_batches(2)))
    assert not list((tmp_path / "ck").glob("*.ckpt"))


def test_model_card(sd_folder: Path, tmp_path: Path) -> None:
    adapter = trained(loaded(StableDiffusion, sd_folder), LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"]))
    adapter = replace(adapter, metadata={"ss_steps": "12", **INFO.metadata})
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "0000.png").touch()
    write_adapter(adapter, tmp_path, ["kohya"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "openrail"
    assert card.data.instance_prompt == "a red seven, svn"
    assert {"lora", "digits", "text-to-image"} <= set(card.data.tags)
    assert card.data.base_model is None  # a folder of this machine
    for text in (
        "# Seven",
        "| trigger words | `a red seven, svn` |",
        "| steps | 12 |",
        "| rank | 2 |",
        "![sample](samples/0000.png)",
        'pipeline.load_lora_weights("this folder", weight_name="pytorch_lora_weights.safetensors")',
        'PeftModel.from_pretrained(pipeline.unet, "this folder")',
        "`kohya.safetensors` is for A1111",
    ):
        assert text in card.content
    config = {**adapter.config, "base_model_name_or_path": "someone/some-model"}
    write_adapter(replace(adapter, config=config), tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "someone/some-model"


def test_the_card_of_dora_says_how_diffusers_loads_it(sd_folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], use_dora=True)
    write_adapter(trained(loaded(StableDiffusion, sd_folder), config), tmp_path)
    assert 'pipeline.load_lora_weights("this folder"' in (tmp_path / "README.md").read_text()


def test_empty_trigger_words() -> None:
    for words in ("a", ["a", " "]):
        with pytest.raises(UserError, match=r"should be a list of words|write a list, each item a text"):
            AdapterInfo(trigger_words=words)


def test_the_code_for_the_embedded_base_runs() -> None:
    lines = loading_lines({}, "embedded", "StableDiffusionPipeline", "AutoencoderKL")
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    assert type(names["pipeline"]) is StableDiffusionPipeline
