from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_lora.families import StableDiffusion


def test_captions_that_are_cut_are_told_once(sd_folder: Path) -> None:
    family = StableDiffusion(str(sd_folder))
    family.load(torch.float32)
    most = family.encoders["tokenizer"].model_max_length
    fitting, long = "a " * (most - 2), "a " * (most - 1)
    family.encode_captions([fitting])  # a warning would be an error
    with pytest.warns(UserWarning, match=rf"a caption has \d+ tokens, and the text encoder reads {most}"):
        family.encode_captions(["a", long])
    family.encode_captions([long])
