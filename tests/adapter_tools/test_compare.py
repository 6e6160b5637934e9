"""Distances of adapters are those of the full matrices."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from peft import LoHaConfig

from lit_lora.adapter_tools.compare import Distance, compare
from lit_lora.adapter_tools.merge import NamedAdapter, merge
from lit_lora.errors import UserError
from lit_lora.formats import AdapterFiles
from tests.adapter_tools.layers import adapter, config, layers_of, without
from tests.formats.adapters import encoder_adapter

PATHS = ("one", "two")
ONE = adapter(config(), seed=1)
TWO = adapter(config(r=2, lora_alpha=8, use_rslora=True), seed=2)


def test_distance_and_angle_of_the_full_matrices() -> None:
    found = compare(ONE, TWO, PATHS)
    assert (found.only_first, found.only_second, found.config) == ([], [], {})
    one, two = ({name: layer.delta() for name, layer in layers_of(files).items()} for files in (ONE, TWO))
    for name, distance in found.layers.items():
        assert distance.ranks == (4, 2)
        assert distance.relative == pytest.approx(float((one[name] - two[name]).norm() / one[name].norm()), rel=1e-5)
        expected = torch.nn.functional.cosine_similarity(one[name].flatten(), two[name].flatten(), dim=0)
        assert distance.cosine == pytest.approx(float(expected), abs=1e-5)
    all_one, all_two = (torch.cat([value.flatten() for value in deltas.values()]) for deltas in (one, two))
    assert found.total.relative == pytest.approx(float((all_one - all_two).norm() / all_one.norm()), rel=1e-5)
    assert found.total.cosine == pytest.approx(float(all_one @ all_two / all_one.norm() / all_two.norm()), abs=1e-5)


def test_the_same_update_in_other_factors() -> None:
    twice = merge([NamedAdapter("a", ONE, 0.25), NamedAdapter("b", ONE, 0.75)])
    for distance in compare(ONE, twice, PATHS).layers.values():
        assert distance.relative < 1e-6
        assert distance.cosine == pytest.approx(1)


def test_layers_and_settings_that_only_one_has() -> None:
    other = replace(without(ONE, "conv"), config={**ONE.config, "lora_dropout": 0.5})
    other = replace(other, text_encoders={"text_encoder": encoder_adapter()})
    found = compare(ONE, other, PATHS)
    assert found.config == {"lora_dropout": (0.0, 0.5)}
    assert found.only_first == ["conv"]
    assert found.only_second == ["text_encoder.text_model.encoder.layers.1.self_attn.out_proj"]
    assert set(found.layers) == {"grouped", "linear", "pointwise"}


def test_magnitudes_are_rows_of_their_own() -> None:
    one, two = (adapter(config(use_dora=True, target_modules=["linear", "conv"]), seed=seed) for seed in (1, 2))
    found = compare(one, two, PATHS)
    assert list(found.layers) == ["conv", "conv (magnitude)", "linear", "linear (magnitude)"]
    key = "base_model.model.linear.lora_magnitude_vector"
    expected = (one.state[key] - two.state[key]).norm() / one.state[key].norm()
    assert found.layers["linear (magnitude)"].relative == pytest.approx(float(expected), rel=1e-5)


def test_other_methods_are_compared_by_tensors() -> None:
    one, two = (adapter(LoHaConfig(r=2, target_modules=["linear"]), seed=seed) for seed in (1, 2))
    found = compare(one, two, PATHS)
    key = "base_model.model.linear.hada_w1_a"
    expected = (one.state[key] - two.state[key]).norm() / one.state[key].norm()
    assert found.layers[key].relative == pytest.approx(float(expected), rel=1e-5)


def test_what_has_no_distance() -> None:
    assert Distance(0, 0, 0, 0).relative == 0
    assert math.isnan(Distance(0, 1, 1, 0).cosine)
    assert Distance(0, 1, 1, 0).relative == math.inf


def test_different_kinds() -> None:
    with pytest.raises(UserError, match="one is LoRA, and two is LOHA: their layers cannot be compared"):
        compare(ONE, adapter(LoHaConfig(r=2, target_modules=["linear"])), PATHS)
    state = {
        key: torch.randn(4, 9) if key.endswith("linear.lora_A.weight") else value for key, value in ONE.state.items()
    }
    with pytest.raises(UserError, match=r"linear has the shape \(10, 8\) in one and \(10, 9\) in two"):
        compare(ONE, AdapterFiles(state, ONE.config), PATHS)
