from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_lora.families import ModelFamily
from lit_lora.families.cut_captions import _told, tell_cut_captions
from tests.families.folders import BASES


def is_told(family: ModelFamily, captions: list[str]) -> bool:
    """Whether encoding warns that a caption is cut; the message has the caption without the template around it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        family.encode_captions(captions)
    told = [str(one.message) for one in caught if "a caption has" in str(one.message)]
    assert all(f"not trained on: '{captions[-1][:60]}" in message for message in told)
    return bool(told)


@pytest.mark.parametrize("name", BASES)
def test_captions_that_are_cut_are_told_once(name: str, request: pytest.FixtureRequest) -> None:
    """Letters that are cut do not change the embeddings. What is cut first may be the end of a template."""
    family_class, fixture = BASES[name]
    family = family_class(str(request.getfixturevalue(fixture)))
    family.load(torch.float32)
    shortest, longest = 1, 3000  # letters; tiny tokenizers have a token for each
    while longest - shortest > 1:
        middle = (shortest + longest) // 2
        _told.clear()
        if is_told(family, ["a" * middle]):
            longest = middle
        else:
            shortest = middle
    _told.clear()
    one, more, cut = (family.encode_captions(["a" * number]) for number in (shortest - 1, shortest, shortest + 60))
    assert not equal(one, more)
    assert equal(cut, family.encode_captions(["a" * (shortest + 61)]))
    _told.clear()
    assert not is_told(family, ["a", "a" * shortest])
    assert is_told(family, ["a", "a" * longest])
    assert not is_told(family, ["a" * longest])


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


class Letters:
    """A tokenizer with a token for each letter."""

    def __init__(self, model_max_length: int) -> None:
        self.model_max_length = model_max_length

    def __call__(self, text: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=list(text))


def test_a_text_that_another_encoder_reads_is_not_told() -> None:
    """CLIP reads the beginning of FLUX.1's captions, and T5 the whole."""
    clip, t5 = Letters(4), Letters(9)
    mask, texts = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]), ["ab", "abcdef"]
    tell_cut_captions(clip, texts, mask, texts, {"tokenizer": clip, "tokenizer_2": t5})
    with pytest.warns(UserWarning, match="has 6 tokens, and the text encoder reads 4.*'abcdef'"):
        tell_cut_captions(clip, texts, mask, texts, {"tokenizer": clip, "text_encoder": object()})
    tell_cut_captions(t5, ["abcd"], torch.ones(1, 4), ["abcd"])


def test_a_plan_of_the_memory_has_no_values() -> None:
    with FakeTensorMode():
        tell_cut_captions(Letters(4), ["abcdef"], torch.ones(1, 4), ["abcdef"])
