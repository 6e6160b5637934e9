"""An adapter fits its own base, and every difference is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import BOFTConfig, LoHaConfig, LoraConfig, PeftConfig

from lit_lora.adapter_tools.base_model import BaseModel
from lit_lora.adapter_tools.check import check, raise_problems
from lit_lora.adapters import inject, plain_config
from lit_lora.adapters.state import adapter_state
from lit_lora.errors import UserError
from lit_lora.families import Flux, ModelFamily
from lit_lora.formats import AdapterFiles
from tests.families.folders import FOLDERS
from tests.formats.adapters import encoder_adapter


def checked(adapter: AdapterFiles, base: Path) -> list[tuple[str, str, int]]:
    model = BaseModel(str(base))
    found = check(adapter, "adapter", model)
    raise_problems(found, "adapter", model)
    return [(part.name, part.model, part.tensors) for part in found]


def made_for(folder: Path, config: PeftConfig) -> AdapterFiles:
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    return AdapterFiles(adapter_state(inject(unet, config, ())), plain_config(config))


@pytest.fixture
def lora(sd_folder: Path) -> AdapterFiles:
    return made_for(sd_folder, LoraConfig(r=2, target_modules=["to_q", "conv_in"]))


@pytest.mark.parametrize("kind", FOLDERS, ids=lambda kind: kind.__name__)
def test_adapters_of_every_family(kind: type[ModelFamily], request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(FOLDERS[kind])
    family = kind(str(folder))
    family.load(torch.float32, without=("vae", "text"))
    family.add_adapter(LoraConfig(r=2, rank_pattern={"to_q": 3}, use_dora=True))
    config = plain_config(family.denoiser.peft_config["default"])
    adapter = AdapterFiles(adapter_state(family.denoiser), config, family=kind)
    assert checked(adapter, folder) == [("denoiser", kind.denoiser_class.__name__, len(adapter.state))]


def test_only_configs_are_read(lora: AdapterFiles, sd_folder: Path, tmp_path: Path) -> None:
    for file in ("model_index.json", "unet/config.json", "text_encoder/config.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes((sd_folder / file).read_bytes())
    both = replace(lora, text_encoders={"text_encoder": encoder_adapter()})
    assert checked(both, tmp_path)[1] == ("text_encoder", "CLIPTextModel", 2)
    assert checked(lora, tmp_path / "unet") == [("denoiser", "UNet2DConditionModel", len(lora.state))]


def test_another_method(sd_folder: Path) -> None:
    loha = made_for(sd_folder, LoHaConfig(r=2, target_modules=["to_q"]))
    assert checked(loha, sd_folder) == [("denoiser", "UNet2DConditionModel", len(loha.state))]
    del loha.state[min(loha.state)]
    with pytest.raises(
        UserError, match=r"1 tensors are missing that the adapter's config asks for, such as .*hada_w1_a"
    ):
        checked(loha, sd_folder)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT's BOFT
def test_a_method_that_is_made_of_the_weights(sd_folder: Path) -> None:
    boft = made_for(sd_folder, BOFTConfig(boft_block_size=4, target_modules=["to_q"]))
    [part] = check(boft, "adapter", BaseModel(str(sd_folder)))
    assert not part.problems
    assert part.unchecked.startswith("PEFT makes BOFT of the base's weights")
    renamed = replace(boft, state={key.replace("attn1.to_q", "attn1.to_x"): value for key, value in boft.state.items()})
    with pytest.raises(
        UserError, match=r"\d+ of \d+ tensors belong to no layer of this base, such as .*attn1.to_x.boft_R"
    ):
        checked(renamed, sd_folder)


def _renamed(adapter: AdapterFiles) -> AdapterFiles:
    return replace(adapter, state={key.replace("conv_in", "conv_start"): value for key, value in adapter.state.items()})


def _reshaped(adapter: AdapterFiles) -> AdapterFiles:
    key = "base_model.model.conv_in.lora_A.weight"
    return replace(adapter, state={**adapter.state, key: torch.zeros(2, 9, 3, 3)})


def _of_flux(adapter: AdapterFiles) -> AdapterFiles:
    layer = "single_transformer_blocks.0.proj_mlp"
    state = {f"base_model.model.{layer}.lora_{name}.weight": torch.zeros(2, 2) for name in "AB"}
    return replace(adapter, state=state, config={**adapter.config, "target_modules": [layer]}, family=None)


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (_renamed, ["2 of 18 tensors belong to no layer of this base, such as conv_start.lora_A.weight"]),
        (_renamed, ["2 tensors are missing that the adapter's config asks for, such as conv_in.lora_A.weight"]),
        (_reshaped, [r"conv_in.lora_A.weight has the shape \(2, 9, 3, 3\), and the base needs \(2, 4, 3, 3\)"]),
        (lambda one: replace(one, config={**one.config, "target_modules": ["to_quux"]}), ["Target modules .*to_quux"]),
        (_of_flux, ["has none of its 1 layers, such as single_transformer_blocks.0.proj_mlp: they are those of .*Flux"]),
        (lambda one: replace(one, family=Flux), ["adapter of Flux, and .* is a StableDiffusion"]),
        (lambda one: replace(one, config={**one.config, "target_modules": "(a+)+$["}), ["is not a regular expression"]),
    ],
)  # fmt: skip
def test_what_does_not_fit(
    change: Callable[[AdapterFiles], AdapterFiles], messages: list[str], lora: AdapterFiles, sd_folder: Path
) -> None:
    for message in messages:
        with pytest.raises(UserError, match=message):
            checked(change(lora), sd_folder)


def test_a_rank_above_the_layers_size(sd_folder: Path) -> None:
    adapter = made_for(sd_folder, LoraConfig(r=20, target_modules=["to_q", "conv_in"]))
    with pytest.raises(UserError) as raised:
        checked(adapter, sd_folder)
    assert "conv_in has rank 20; a weight of the shape (16, 4, 3, 3) has at most 16" in str(raised.value)


def test_many_problems_are_shortened(sd_folder: Path, lora: AdapterFiles) -> None:
    adapter = made_for(sd_folder, LoraConfig(r=99, lora_alpha=99, target_modules="all-linear"))
    with pytest.raises(UserError, match=r"(?s)does not fit .*\n  and \d+ more\nUse the base"):
        checked(adapter, sd_folder)


def test_a_class_that_nobody_knows(lora: AdapterFiles, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "NewModel"}')
    with pytest.raises(UserError, match=r"the class NewModel of .* is not known to diffusers"):
        checked(lora, tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "block_out_channels": [1]}')
    with pytest.raises(UserError, match="does not make a UNet2DConditionModel"):
        checked(lora, tmp_path)
