from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lit_lora.callbacks.frozen_weights import changed_weights, frozen_weights
from tests.helpers import processes


def base(change: Callable[[Tensor], None] | None = None) -> nn.Module:
    """A frozen module with rows of 4, 2 and 1 bytes to a word, and with fewer rows than processes."""
    torch.manual_seed(0)
    layers = nn.Linear(3, 5), nn.Conv2d(4, 7, 3).bfloat16(), nn.Linear(4096, 1), nn.Conv2d(1, 3, 3).half()
    module = nn.Sequential(*layers).requires_grad_(False)
    module.odd = nn.Parameter(torch.randint(0, 255, (5, 3), dtype=torch.uint8), requires_grad=False)
    if change is not None:
        change(module.get_parameter("2.weight" if change is one_value else "0.weight"))
    return module


def one_value(weight: Tensor) -> None:
    weight[0, 4095] += 1e-6


def swap_rows(weight: Tensor) -> None:
    weight.copy_(weight[[0, 1, 4, 3, 2]])


def swap_columns(weight: Tensor) -> None:
    weight.copy_(weight[:, [0, 2, 1]])


@pytest.mark.parametrize("change", [one_value, swap_rows, swap_columns, Tensor.zero_], ids=lambda one: one.__name__)
def test_any_other_value_has_another_fingerprint(change: Callable[[Tensor], None]) -> None:
    saved = frozen_weights(base())
    assert all(saved.values())
    assert changed_weights(saved, frozen_weights(base())) == []
    name = "2.weight" if change is one_value else "0.weight"
    told = [f"1 weights of the base have other values or another shape here, such as {name}"]
    assert changed_weights(saved, frozen_weights(base(change))) == told


def test_layers_of_equal_values_differ_by_their_value() -> None:
    ones, twos = nn.LayerNorm(64), nn.LayerNorm(64)
    nn.init.constant_(twos.weight, 2)
    saved, here = (frozen_weights(one.requires_grad_(False)) for one in (ones, twos))
    assert changed_weights(saved, here) == [
        "1 weights of the base have other values or another shape here, such as weight"
    ]


@pytest.mark.parametrize("count", [2, 3])
def test_shards_have_the_fingerprints_of_full_weights(count: int, tmp_path: Path) -> None:
    processes(["-m", "tests.callbacks.frozen_script", tmp_path], count, tmp_path)
    full, sharded = json.loads((tmp_path / "frozen.json").read_text())
    assert len(full) == 9
    assert all(full.values())
    assert sharded == full == frozen_weights(base())
