"""Checks of values that are shared by all constructors."""

from __future__ import annotations

from inspect import isabstract, isclass, signature
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from peft import LoraConfig

import lit_lora
from lit_lora.callbacks import LoraInjection
from lit_lora.datamodules import AspectRatioBuckets, Captions, Chunks, WebDatasetDataModule, WebDatasetStreamDataModule
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily, StableDiffusion
from lit_lora.lazy import public_names
from lit_lora.module import LoraDiffusion
from lit_lora.quantization import NF4

CONFIGURED = (Callback, LightningDataModule, LightningModule, ModelFamily, Chunks, AspectRatioBuckets, Captions)
"""Kinds of parts that a config makes."""

ADAPTER = LoraConfig(r=2, target_modules=["to_q"])


@pytest.mark.parametrize(
    ("made", "arguments", "told"),
    [
        (
            LoraDiffusion,
            {"family": "embedded"},
            "family is 'embedded', and takes an object of ModelFamily, such as Sta",
        ),
        (LoraDiffusion, {"family": ADAPTER}, "family is LoraConfig, and takes an object of ModelFamily"),
        (
            LoraDiffusion,
            {"adapter": {"r": 4}},
            "adapter is dict, and takes an object of PeftConfig, such as peft.LoraConf",
        ),
        (LoraDiffusion, {"objective": "ddpm"}, "objective is 'ddpm', and takes an object of Objective, such as DDPM"),
        (LoraDiffusion, {"quantization": NF4}, "quantization is the class NF4, and takes an object of Quantization"),
        (LoraDiffusion, {"optimizer": "AdamW"}, "optimizer is 'AdamW'; give a function that makes one"),
        (
            LoraDiffusion,
            {"optimizer": torch.optim.SGD([torch.zeros(1)])},
            "optimizer is an object of SGD; give a function",
        ),
        (LoraDiffusion, {"base_dtype": "bf16"}, "base_dtype='bf16' is none of float32, bfloat16, float16"),
        (LoraInjection, {"adapter": {"r": 4}}, "adapter is dict, and takes an object of PeftConfig"),
        (
            LoraInjection,
            {"adapter": ADAPTER, "quantization": "NF4"},
            "quantization is 'NF4', and takes an object of Quan",
        ),
        (WebDatasetDataModule, {"buckets": True}, "buckets is True, and takes an object of AspectRatioBuckets"),
        (
            WebDatasetDataModule,
            {"decoder": "ImageDecoder"},
            "decoder is 'ImageDecoder', and takes an object of SampleDeco",
        ),
        (WebDatasetDataModule, {"batch_size": "2"}, "batch_size='2' is a str"),
        (
            WebDatasetStreamDataModule,
            {"train_shards": "x", "batches_per_epoch": 1, "decoder": {}},
            "decoder is dict, and takes an object of SampleDecoder",
        ),
    ],
)
def test_arguments_of_another_class_are_refused_by_the_constructor(
    made: type[Any], arguments: dict[str, Any], told: str
) -> None:
    if made is LoraDiffusion:
        arguments = {"family": StableDiffusion("embedded"), "adapter": ADAPTER} | arguments
    with pytest.raises(UserError) as refused:
        made(**arguments)
    assert str(refused.value).startswith(told)


GIVEN: dict[str, dict[str, Any]] = {
    "LoraDiffusion": {"family": StableDiffusion("embedded"), "adapter": ADAPTER},
    "RankBudget": {"mean_rank": 4},
    "WebDatasetStreamDataModule": {"train_shards": "x", "batches_per_epoch": 1, "val_shards": "x", "val_batches": 1},
    "SampleImages": {"prompts": ["a star"]},
}
"""Arguments beside which an option can be tried."""


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name in sorted(public_names())
        if isclass(made := getattr(lit_lora, name)) and not isabstract(made) and issubclass(made, CONFIGURED)
        for option, parameter in signature(made.__init__).parameters.items()
        if {"int", "int | None"} & {str(parameter.annotation)} and not option.startswith("_")
    ],
)
def test_an_option_that_takes_a_whole_number_refuses_others(name: str, option: str) -> None:
    made = getattr(lit_lora, name)
    given = {"pretrained_model_name_or_path": "x"} if issubclass(made, ModelFamily) else GIVEN.get(name, {})
    for value in (16.5, True, "3"):
        with pytest.raises(UserError, match=f"{option}={value!r} is a {type(value).__name__}; write"):
            made(**given | {option: value})


def test_one_module_has_one_injection(trainer_options: dict[str, Any]) -> None:
    callbacks = [LoraInjection(ADAPTER), LoraInjection(ADAPTER)]
    trainer = Trainer(**trainer_options | {"callbacks": callbacks})
    with pytest.raises(UserError, match="has two LoraInjection"):
        callbacks[1].setup(trainer, LightningModule(), "fit")


def test_loaders_before_setup_are_refused() -> None:
    data = WebDatasetDataModule("shards", val_samples=2)
    with pytest.raises(UserError, match=r"call setup\('fit'\) of the datamodule first"):
        data.val_dataloader()
    assert WebDatasetDataModule("shards").val_dataloader() == []


def test_a_public_name_that_is_misspelt_has_a_suggestion() -> None:
    with pytest.raises(AttributeError) as missing:
        getattr(lit_lora, "LoraDifusion")  # noqa: B009
    assert (missing.value.name, missing.value.obj) == ("LoraDifusion", lit_lora)
