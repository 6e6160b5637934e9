from __future__ import annotations

import time

import peft
import pytest
from torch import nn

from lit_lora.adapters import bounds, inject
from lit_lora.errors import UserError


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(8, 24), nn.Conv2d(2, 6, 3), nn.ReLU())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            peft.LoraConfig(r=10**6),
            "r=1000000 is too large for 0, which has 8 inputs and 24 outputs: it must be at most 1024",
        ),
        (peft.LoraConfig(r=1025), "it must be at most 1024; lower r, or set rank_pattern for this layer"),
        (
            peft.LoraConfig(r=4, rank_pattern={"1": 1025}),
            "r=1025 is too large for 1, which has 18 inputs and 6 outputs",
        ),
        (peft.LoraConfig(r=10**6, target_modules="all-linear"), "r=1000000 is too large for 0"),
        (peft.LoraConfig(r=10**6, target_modules="[0]"), "r=1000000 is too large for 0"),
        (peft.AdaLoraConfig(init_r=10**6, target_r=2, total_step=10), "r=1000000 is too large for 0"),
        (peft.LoHaConfig(r=10**6), "r=1000000 is too large for 0"),
        (peft.LoraConfig(r=0, target_modules=["0"]), "r=0 is too small; it must be at least 1"),
        (peft.LoHaConfig(r=-4, target_modules=["0"]), "r=-4 is too small; it must be at least 1"),
        (
            peft.LoraConfig(target_modules=["0"], rank_pattern={"0": 0}),
            r"rank_pattern\['0'\]=0 is too small; it must be at least 1",
        ),
        (
            peft.LoraConfig(lora_dropout=1.5),
            r"lora_dropout=1.5 drops all, so that nothing is learned; it must be below 1",
        ),
        (peft.LoraConfig(lora_dropout=-0.5), r"lora_dropout=-0.5 is too small; it must be at least 0"),
        (peft.LoHaConfig(rank_dropout=1.0), r"rank_dropout=1.0 drops all"),
        (peft.LoKrConfig(module_dropout=float("nan")), "module_dropout=nan is too small"),
        (peft.VeraConfig(r=10**6), "r=1000000 of VeraConfig is too large; it must be at most 65536"),
    ],
)
def test_options_out_of_bounds(model, config, message):
    with pytest.raises(UserError, match=message):
        inject(model, config, ("0", "1"))


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("key", [False, 3, None])
def test_patterns_that_yaml_read_as_something_else(model, option, key):
    with pytest.raises(UserError, match=f"{option} has the key {key}, which is no text: YAML reads .* in quotes"):
        inject(model, peft.LoraConfig(r=2, **{option: {key: 2}}), ("0",))


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=18, rank_pattern={"0": 24}),
        peft.LoKrConfig(r=10**6),
        peft.LoraConfig(r=20, target_modules=["0"]),
    ],
)
@pytest.mark.filterwarnings("ignore:lora_alpha")
def test_rank_within_them(model, config):
    inject(model, config, ("0", "1"))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("config", "most"), [(peft.LoraConfig(r=9), 8), (peft.LoraConfig(r=7, target_modules=["1"]), 6)]
)
def test_rank_that_no_layer_can_use(model, config, most):
    with pytest.warns(
        UserWarning, match=rf"r={config.r} is above {most}, .*; the rest only takes memory: set r to at most"
    ):
        inject(model, config, ("0", "1"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=8, lora_alpha=8),  # the other layer has 6 outputs
        peft.LoraConfig(r=6, lora_alpha=8, target_modules=["1"]),
        peft.VeraConfig(r=256),
    ],
)
def test_rank_that_a_layer_can_use(model, config):
    inject(model, config, ("0",) if isinstance(config, peft.VeraConfig) else ("0", "1"))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r"(a+)+x"},
        {"target_modules": ["0"], "rank_pattern": {"(a|aa)+x": 2}},
        {"target_modules": "0", "exclude_modules": "(a*)*x"},
    ],
)
def test_regular_expression_that_never_ends(monkeypatch, options):
    monkeypatch.setattr(bounds, "MATCH_SECONDS", 1.5)
    model = nn.ModuleDict({"0": nn.Linear(8, 8), "a" * 60: nn.Linear(8, 8)})
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"the regular expression '\(a.*x' .* takes more than"):
        inject(model, peft.LoraConfig(r=2, **options), ())
    assert time.monotonic() - begin < 30


def test_regular_expressions_that_end(model):
    inject(model, peft.LoraConfig(r=2, target_modules="[01]+", rank_pattern={"0*": 4}), ())


def test_wrong_regular_expression(model):
    with pytest.raises(UserError, match=r"'\(' is not a regular expression \(missing \), unterminated subpattern"):
        inject(model, peft.LoraConfig(r=2, target_modules="("), ())


def test_rank_of_a_large_layer():
    inject(nn.Sequential(nn.Linear(2, 1500)), peft.LoraConfig(r=1500, lora_alpha=1500), ("0",))
