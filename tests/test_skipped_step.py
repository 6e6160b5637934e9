"""Skipped steps, for each way of skipping: weights, optimizer state and counters as if there had been no such step."""

from __future__ import annotations

import copy
import importlib
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lit_lora.skipped_step
from lit_lora.skipped_step import skip_step_where

NAN = float("nan")

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "torch.optim.AdamW": {"weight_decay": 0.1},
    "torch.optim.SGD": {"momentum": 0.9, "weight_decay": 0.1},
    "torch.optim.Adafactor": {"weight_decay": 0.1},
    "torch.optim.Muon": {"weight_decay": 0.1},
    "torch.optim.LBFGS": {"max_iter": 1},
    "transformers.optimization.Adafactor": {"relative_step": False, "scale_parameter": False, "weight_decay": 0.1},
    "prodigyopt.Prodigy": {"weight_decay": 0.1, "safeguard_warmup": True},
    "came_pytorch.CAME": {"weight_decay": 0.1},
    "schedulefree.AdamWScheduleFree": {"weight_decay": 0.1, "warmup_steps": 3},
    "schedulefree.SGDScheduleFree": {"weight_decay": 0.1, "warmup_steps": 3},
    "bitsandbytes.optim.AdamW8bit": {"weight_decay": 0.1, "min_8bit_size": 1},
}
FUSED: dict[str, dict[str, Any]] = {
    "torch.optim.Adam": {"weight_decay": 0.1},
    "torch.optim.AdamW": {"weight_decay": 0.1},
    "torch.optim.SGD": {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1},
    "torch.optim.Adagrad": {"weight_decay": 0.1},
}


def trained(name: str, options: dict[str, Any], factors: list[float], scaled: bool = False) -> tuple[Tensor, Any]:
    """Weights and state of the optimizer after a step for each factor of the loss."""
    package, _, kind = name.rpartition(".")
    module = pytest.importorskip(package.partition(".")[0]) and importlib.import_module(package)
    weight = nn.Parameter(torch.linspace(-1, 1, 48).view(6, 8))
    optimizer = getattr(module, kind)([weight], lr=0.1, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
    if hasattr(optimizer, "train"):
        optimizer.train()

    @torch.enable_grad()
    def closure(factor: float) -> Tensor:  # as Lightning's: it computes gradients and then calls the callbacks
        optimizer.zero_grad()
        loss = (weight.square() * factor).sum()
        scaler.scale(loss).backward()
        if scaled and not options["fused"]:
            scaler.unscale_(optimizer)
        skip_step_where(~loss.detach().isfinite(), optimizer, scaled)
        return loss

    for factor in factors:
        if scaled:
            closure(factor)
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step(partial(closure, factor))
    return weight.detach(), copy.deepcopy(optimizer.state_dict())


def assert_same(one: tuple[Tensor, Any], other: tuple[Tensor, Any]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_run_is_that_without_the_step(name: str) -> None:
    options = OPTIMIZERS[name]
    good = trained(name, options, [1.0, 2.0, 3.0])
    if name.endswith("LBFGS"):  # it counts the evaluations of the loss
        assert torch.equal(trained(name, options, [1.0, NAN, 2.0, 3.0])[0], good[0])
    else:
        assert_same(trained(name, options, [NAN, 1.0, NAN, 2.0, NAN, 3.0, NAN]), good)
    assert not torch.equal(trained(name, options, [1.0, 2.0])[0], good[0])


@pytest.mark.parametrize("name", FUSED)
def test_fused_optimizers_decide_on_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the host cannot read the decision without waiting."""
    good = trained(name, FUSED[name] | {"fused": True}, [1.0, 2.0, 3.0])
    monkeypatch.setattr(lit_lora.skipped_step, "_is_read", lambda _: False)
    assert_same(trained(name, FUSED[name] | {"fused": True}, [NAN, 1.0, NAN, 2.0, NAN, NAN, 3.0, NAN]), good)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_skips_by_itself(fused: bool) -> None:
    options = {"momentum": 0.9, "weight_decay": 0.1, "fused": fused}
    good = trained("torch.optim.SGD", options, [1.0, 2.0], scaled=True)
    assert_same(trained("torch.optim.SGD", options, [1.0, NAN, 2.0, NAN], scaled=True), good)


def test_a_scaler_skips_where_the_loss_alone_is_bad() -> None:
    """The scaler does not look at the loss."""
    for fused in (False, True):
        weight = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.AdamW([weight], fused=fused)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(weight.sum()).backward()
        if not fused:
            scaler.unscale_(optimizer)  # as Lightning does before its callbacks
        skip_step_where(torch.tensor(True), optimizer, scaled=True)
        scaler.step(optimizer)
        assert weight.tolist() == [1.0, 1.0]


def test_other_optimizers_on_a_gpu_get_gradients_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lit_lora.skipped_step, "_is_read", lambda _: False)
    weight, state = trained("torch.optim.AdamW", {"weight_decay": 0.0}, [1.0, NAN, NAN, NAN])
    assert weight.isfinite().all()
    assert state["state"][0]["exp_avg"].isfinite().all()
    assert state["state"][0]["step"] == 4
    assert not torch.equal(weight, trained("torch.optim.AdamW", {"weight_decay": 0.0}, [1.0])[0])


def test_counters_stay_where_a_scaler_has_left_out_the_step() -> None:
    """The later step is not undone."""
    schedulefree = pytest.importorskip("schedulefree")
    weight = nn.Parameter(torch.ones(2))
    optimizer = schedulefree.SGDScheduleFree([weight], lr=0.1)
    optimizer.train()
    skip_step_where(torch.tensor(True), optimizer, scaled=True)
    for _ in range(2):
        weight.sum().backward()
        optimizer.step()
    assert optimizer.param_groups[0]["k"] == 2
