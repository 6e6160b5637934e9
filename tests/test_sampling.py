from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionXLPipeline
from PIL import Image

from lit_lora.errors import UserError
from lit_lora.sampling import SamplingOptions, check_guidance_rescale, generate


def test_there_is_at_least_one_denoising_step() -> None:
    assert SamplingOptions(num_inference_steps=1).num_inference_steps == 1
    with pytest.raises(UserError, match="num_inference_steps=0 is too small; it must be at least 1"):
        SamplingOptions(num_inference_steps=0)


def test_what_a_pipeline_gets() -> None:
    """Prompts in batches, their seeds, and its own argument for guidance; it keeps no tensors of inference mode."""
    calls: list[dict[str, Any]] = []

    def pipeline(**arguments: Any) -> SimpleNamespace:
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        calls.append(arguments)
        return SimpleNamespace(images=[Image.new("RGB", (1, 1))] * len(arguments["prompt"]))

    def own_scale(prompts: list[str], scale: float) -> dict[str, Any]:
        return {"prompt": prompts, "guidance_scale": scale - 1, "true_cfg_scale": scale}

    options: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, "batch_size": 2}
    with torch.inference_mode():
        images = generate(pipeline, ["a", "b", "c"], [5, 6, 7], **options)  # type: ignore[arg-type]
        generate(pipeline, ["d"], [8], prompt_inputs=own_scale, **options)  # type: ignore[arg-type]
    assert len(images) == 3
    assert [call["prompt"] for call in calls] == [["a", "b"], ["c"], ["d"]]
    assert [[one.initial_seed() for one in call["generator"]] for call in calls] == [[5, 6], [7], [8]]
    assert [call["guidance_scale"] for call in calls] == [4, 4, 3]
    assert calls[2]["true_cfg_scale"] == 4
    assert "true_cfg_scale" not in calls[0]


def test_guidance_is_rescaled_where_the_pipeline_can() -> None:
    check_guidance_rescale(StableDiffusionXLPipeline, 0.7)
    check_guidance_rescale(FluxPipeline, 0.0)
    with pytest.raises(UserError, match=r"guidance_rescale=0.7: FluxPipeline has no such option; leave it at 0"):
        check_guidance_rescale(FluxPipeline, 0.7)
    with pytest.raises(UserError, match=r"guidance_rescale=1.5 is too large; it must be at most 1"):
        SamplingOptions(guidance_rescale=1.5)
