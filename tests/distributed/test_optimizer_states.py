"""Optimizer states go by the names of the parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lit_lora.distributed.optimizer_states import make_portable
from lit_lora.errors import UserError


def _trained(order: list[str], kind: Any = torch.optim.AdamW) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A module of three layers with an optimizer of their weights in this order, after a step."""
    torch.manual_seed(0)
    module = nn.ModuleDict({name: nn.Linear(2, size, bias=False) for name, size in (("a", 2), ("b", 3), ("c", 4))})
    optimizer = kind([module[name].weight for name in order], lr=0.1)
    make_portable(optimizer, module)
    sum((layer(torch.ones(1, 2)) ** 2).sum() for layer in module.values()).backward()
    optimizer.step()
    return module, optimizer


def _averages(module: nn.Module, optimizer: Any, key: str = "exp_avg") -> dict[str, torch.Tensor]:
    return {name: optimizer.state[p][key] for name, p in module.named_parameters() if p in optimizer.state}


def test_a_state_names_the_parameters() -> None:
    _, optimizer = _trained(["b", "a", "c"])
    (group,) = optimizer.state_dict()["param_groups"]
    assert group["param_names"] == ["b.weight", "a.weight", "c.weight"]


def test_another_order_of_the_parameters() -> None:
    saved_module, saved = _trained(["b", "a", "c"])
    module, optimizer = _trained(["c", "b", "a"])
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
    optimizer.load_state_dict(saved.state_dict())
    expected, found = _averages(saved_module, saved), _averages(module, optimizer)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    optimizer.step()


def test_an_optimizer_with_a_loader_of_its_own() -> None:
    """As those of bitsandbytes."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    saved_module, saved = _trained(["b", "a", "c"], bitsandbytes.optim.AdamW)
    module, optimizer = _trained(["c", "b", "a"], bitsandbytes.optim.AdamW)
    optimizer.load_state_dict(saved.state_dict())
    expected, found = _averages(saved_module, saved, "state1"), _averages(module, optimizer, "state1")
    assert expected
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    with pytest.raises(UserError, match="only in one of them"):
        _trained(["a"], bitsandbytes.optim.AdamW)[1].load_state_dict(saved.state_dict())


def test_a_state_without_names_goes_by_the_order() -> None:
    _, saved = _trained(["a", "b", "c"])
    state = saved.state_dict()
    del state["param_groups"][0]["param_names"]
    module, optimizer = _trained(["a", "b", "c"])
    optimizer.load_state_dict(state)
    assert set(_averages(module, optimizer)) == {"a.weight", "b.weight", "c.weight"}


def test_the_state_of_other_parameters_is_refused() -> None:
    _, saved = _trained(["a", "b"])
    _, optimizer = _trained(["a", "c"])
    with pytest.raises(UserError, match=r"2 parameters in 1 groups, here are 2 in 1; b\.weight is only in one of them"):
        optimizer.load_state_dict(saved.state_dict())


def test_what_an_optimizer_has_no_state_for_yet() -> None:
    module, _ = _trained(["a", "b"])
    fresh = torch.optim.AdamW(module.parameters())
    make_portable(fresh, module)
    other = torch.optim.AdamW(module.parameters())
    make_portable(other, module)
    other.load_state_dict(fresh.state_dict())
    assert not other.state
