from __future__ import annotations

import pytest
from diffusers import FluxPipeline, StableDiffusionXLPipeline

from lit_lora.errors import UserError
from lit_lora.sampling import SamplingOptions, check_guidance_rescale


def test_there_is_at_least_one_denoising_step() -> None:
    assert SamplingOptions(num_inference_steps=1).num_inference_steps == 1
    with pytest.raises(UserError, match="num_inference_steps=0 is too small; it must be at least 1"):
        SamplingOptions(num_inference_steps=0)


def test_guidance_is_rescaled_where_the_pipeline_can() -> None:
    check_guidance_rescale(StableDiffusionXLPipeline, 0.7)
    check_guidance_rescale(FluxPipeline, 0.0)
    with pytest.raises(UserError, match=r"guidance_rescale=0.7: FluxPipeline has no such option; leave it at 0"):
        check_guidance_rescale(FluxPipeline, 0.7)
    with pytest.raises(UserError, match=r"guidance_rescale=1.5 is too large; it must be at most 1"):
        SamplingOptions(guidance_rescale=1.5)
