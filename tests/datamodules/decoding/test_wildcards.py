"""Alternatives in captions: what is drawn, and what stays."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from lit_lora.datamodules import BadSampleError, Captions, CaptionSource
from lit_lora.datamodules.decoding.wildcards import drawn_alternatives

SLOTS = range(600)


def drawn(text: str) -> Counter[str]:
    generator = np.random.default_rng(0)
    return Counter(drawn_alternatives(text, generator) for _ in SLOTS)


def test_alternatives_are_drawn_equally_often() -> None:
    found = drawn("a {red|blue|} {hat|{wool|silk} scarf}")
    colors, clothes = ("a red", "a blue", "a "), ("hat", "wool scarf", "silk scarf")
    assert set(found) == {f"{color} {cloth}" for color in colors for cloth in clothes}
    assert all(abs(sum(n for text, n in found.items() if f"{color} " in text) - 200) < 50 for color in colors[:2])
    assert abs(sum(n for text, n in found.items() if text.endswith("hat")) - 300) < 50


@pytest.mark.parametrize("text", ["a {name}", "{}", "one | two", "an open {brace|bar", "closed} first", "{{x}}", ""])
def test_other_braces_stay(text: str) -> None:
    assert set(drawn(text)) == {text}


def test_nesting_is_bounded() -> None:
    assert drawn_alternatives("{" * 100, np.random.default_rng(0)) == "{" * 100
    with pytest.raises(BadSampleError, match="nested more than 100 deep"):
        drawn_alternatives("{a|" * 101 + "}" * 101, np.random.default_rng(0))


def test_captions_draw_by_seed_and_slot_alone() -> None:
    source = CaptionSource("txt", template="{an old|a new} photo of {}")
    members = {"txt": b"{a, b|c}, d"}
    captions = Captions([source], suffix="{!|?}", wildcards=True, shuffle_tags=True)
    texts = [captions.draw(members, 3, slot) for slot in SLOTS]
    assert texts == [captions.draw(members, 3, slot) for slot in SLOTS]
    assert texts != [captions.draw(members, 4, slot) for slot in SLOTS]
    # Separators within alternatives come from the alternative that was drawn, and are shuffled like others.
    tags = {"a, b, d", "a, d, b", "b, a, d", "b, d, a", "d, a, b", "d, b, a", "c, d", "d, c"}
    assert set(texts) == {f"{age} photo of {tag}{end}" for age in ("an old", "a new") for tag in tags for end in "!?"}
    assert not captions.fixed


def test_braces_are_text_unless_it_is_asked_for() -> None:
    captions = Captions()
    assert captions.draw({"txt": b"a {red|blue} hat"}, 0, 0) == "a {red|blue} hat"
    assert captions.fixed
    assert "wildcards" not in captions.description()
    assert Captions(wildcards=True).description()["wildcards"]
