from __future__ import annotations

import pytest
from peft.utils.other import get_pattern_key

from lit_lora.adapters.patterns import MOST_PATTERNS, layer_patterns


@pytest.mark.parametrize("count", [5, MOST_PATTERNS, 600])
def test_every_layer_has_its_own_value(count: int) -> None:
    names = [f"blocks.{number}.proj" for number in range(count - 2)] + ["proj", "0.proj"]
    values = {name: number % 7 + 1 for number, name in enumerate(names)}
    patterns = layer_patterns(values)
    assert len(patterns) <= MOST_PATTERNS
    for name, value in values.items():
        assert patterns[get_pattern_key(list(patterns), name)] == value
    for other in ("blocks.1x.proj", "more.blocks.1.projs"):
        assert get_pattern_key(list(patterns), other) == other


def test_few_layers_are_named_one_by_one() -> None:
    assert layer_patterns({"conv": 1.5, "inner.proj": 3.0, "proj": 4.5}) == {
        "conv": 1.5,
        "inner.proj": 3.0,
        "^proj": 4.5,
    }
