from __future__ import annotations

import pytest

from lit_lora.errors import UserError
from lit_lora.sampling import SamplingOptions


def test_there_is_at_least_one_denoising_step() -> None:
    assert SamplingOptions(num_inference_steps=1).num_inference_steps == 1
    with pytest.raises(UserError, match="num_inference_steps=0 is too small; it must be at least 1"):
        SamplingOptions(num_inference_steps=0)
