"""Models of which one at a time is on the device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_lora.memory.one_on_device import OneOnDevice


@pytest.fixture
def models() -> dict[str, nn.Module]:
    return {"small": nn.Linear(2, 2), "large": nn.BatchNorm1d(8)}


def test_copies_go_when_another_model_comes(models: dict[str, nn.Module]) -> None:
    host = {name: model.state_dict(keep_vars=True) for name, model in models.items()}
    places = {name: {key: value.data_ptr() for key, value in state.items()} for name, state in host.items()}
    keeper = OneOnDevice(models, torch.device("cpu"))
    assert keeper.on_device == {}
    keeper.bring(["small"])
    assert keeper.on_device == {"small": 4 * 6}
    assert all(value.data_ptr() != places["small"][key] for key, value in host["small"].items())
    keeper.bring(["large"])
    assert keeper.on_device == {"large": 4 * 32 + 8}  # weights, statistics and a counter
    assert all(value.data_ptr() == places["small"][key] for key, value in host["small"].items())
    keeper.bring(["small", "large"])
    assert set(keeper.on_device) == {"small", "large"}
    keeper.bring([])
    assert keeper.on_device == {}


def test_an_unknown_name(models: dict[str, nn.Module]) -> None:
    with pytest.raises(KeyError):
        OneOnDevice(models, torch.device("cpu")).bring(["other"])
