"""Arguments of public classes are checked against their annotations."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

import lit_lora
from lit_lora import UserError
from lit_lora.argument_types import _hints, check_types
from lit_lora.lazy import public_names

WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: lit_lora.MemoryOptions(vae_tiling="false"), r"vae_tiling='false' is a str; write True or False"),
    (lambda: lit_lora.CordaInitialization(mode="fast"), r"mode='fast' is unknown; write 'ipm' or 'kpm'"),
    (lambda: lit_lora.FP8(skip="up_blocks.*"), r"skip='up_blocks.\*' is a str; write a list, each item a text"),
    (lambda: lit_lora.AdapterEMA(decay="0.9"), r"decay='0.9' is a str; write a finite number"),
    (lambda: lit_lora.LogitNormal(mean=math.nan), r"mean=nan is not finite; write a finite number"),
    (lambda: lit_lora.MinSNR(gamma=np.float32(math.inf)), r"gamma=.*inf.* is not finite; write a finite number"),
    (lambda: lit_lora.PseudoHuber(c=torch.tensor(0.1)), r"c=tensor\(0.1\S*\) is a Tensor; write a finite number"),
    (lambda: lit_lora.EvaInitialization(steps=None), r"steps=None is a NoneType; write a whole number"),
    (lambda: lit_lora.EvaInitialization(steps=True), r"steps=True is a bool; write a whole number"),
    (
        lambda: lit_lora.DDPM(criterion=lit_lora.PseudoHuber),
        r"criterion=the class PseudoHuber .* an object of Criterion",
    ),
    (
        lambda: lit_lora.DDPM(timestep_range=(0.5,)),
        r"timestep_range=\(0.5,\) is a tuple; write 2 values, each a finite",
    ),
    (lambda: lit_lora.Chunks(staging="/disk"), r"staging='/disk' is a str; write an object of Staging or None"),
    (lambda: lit_lora.AdapterInfo(tags="portrait"), r"tags='portrait' is a str; write a list, each item a text"),
    (
        lambda: lit_lora.LoraInjection(LoraConfig(target_modules=["a"]), also_train="head"),
        r"also_train='head' is a str; write a list, each item a text",
    ),
    (lambda: lit_lora.LitLoraDeepSpeed(offload_optimizer="no"), r"offload_optimizer='no' is a str; write True or"),
    (
        lambda: lit_lora.RunReport(price_per_kwh=math.inf),
        r"price_per_kwh=inf is not finite; write a finite number or None",
    ),
]


@pytest.mark.parametrize(("make", "told"), WRONG)
def test_an_argument_of_another_type_is_refused(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        make()


def test_what_stands_for_a_type_is_taken(tmp_path: Path) -> None:
    assert lit_lora.MinSNR(gamma=np.float32(5)).gamma == 5
    assert lit_lora.MinSNR(gamma=5).gamma == 5
    assert lit_lora.EvaInitialization(steps=np.int64(3)).steps == 3
    assert lit_lora.MemoryOptions(vae_slicing=np.bool_(True)).vae_slicing
    assert lit_lora.FP8(skip=("up_blocks.*",)).skip
    assert lit_lora.Staging(dir=tmp_path).dir == tmp_path  # type: ignore[arg-type]


def test_names_for_type_checkers_alone_are_left_alone() -> None:
    class Owner:
        def __init__(self, unknown: OnlyForTypeCheckers, known: int) -> None:  # type: ignore[name-defined]  # noqa: F821
            check_types(Owner, locals())

    Owner("anything", 1)
    with pytest.raises(UserError, match="known='1'"):
        Owner("anything", "1")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(set(public_names()) - {"BadSampleError", "UserError"}))
def test_all_annotations_of_public_classes_can_be_read(name: str) -> None:
    owner = getattr(lit_lora, name)
    if not isinstance(owner.__init__, type(object.__init__)):
        named = {
            one
            for one, parameter in inspect.signature(owner).parameters.items()
            if one in owner.__init__.__annotations__
        }
        assert named <= _hints(owner).keys()
