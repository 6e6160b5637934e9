from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_lora.families import StableDiffusion
from lit_lora.families.cut_captions import tell_cut_captions


def test_captions_that_are_cut_are_told_once(sd_folder: Path) -> None:
    family = StableDiffusion(str(sd_folder))
    family.load(torch.float32)
    most = family.encoders["tokenizer"].model_max_length
    fitting, long = "a " * (most - 2), "a " * (most - 1)
    family.encode_captions([fitting])  # a warning would be an error
    with pytest.warns(UserWarning, match=rf"a caption has \d+ tokens, and the text encoder reads {most}"):
        family.encode_captions(["a", long])
    family.encode_captions([long])


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
    tell_cut_captions(clip, texts, mask, {"tokenizer": clip, "tokenizer_2": t5})
    with pytest.warns(UserWarning, match="has 6 tokens, and the text encoder reads 4.*'abcdef'"):
        tell_cut_captions(clip, texts, mask, {"tokenizer": clip, "text_encoder": object()})
    tell_cut_captions(t5, ["abcd"], torch.ones(1, 4))


def test_a_plan_of_the_memory_has_no_values() -> None:
    with FakeTensorMode():
        tell_cut_captions(Letters(4), ["abcdef"], torch.ones(1, 4))
