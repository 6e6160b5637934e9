from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    Flux2Pipeline,
    FluxPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from lit_lora.errors import UserError
from lit_lora.sampling import (
    SamplingOptions,
    check_guidance_rescale,
    check_negative_prompts,
    generate,
    image_grid,
)


def test_there_is_at_least_one_denoising_step() -> None:
    assert SamplingOptions(num_inference_steps=1).num_inference_steps == 1
    with pytest.raises(UserError, match="num_inference_steps=0 is too small; it must be at least 1"):
        SamplingOptions(num_inference_steps=0)


def test_guidance_that_is_no_scale() -> None:
    with pytest.raises(UserError, match=r"guidance_scale=-1.0 is too small; it must be at least 0"):
        SamplingOptions(guidance_scale=-1.0)
    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"guidance_scale={value} is not finite; write a finite number"):
            SamplingOptions(guidance_scale=value)


@pytest.mark.parametrize(("kind", "most"), [(DDIMScheduler, 1000), (LCMScheduler, 50)])
def test_more_steps_than_the_scheduler_has(kind: Any, most: int, sd_folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    told = f"num_inference_steps={most + 1} is too large for {kind.__name__}; draw with at most {most} steps"
    with pytest.raises(UserError, match=told):
        generate(pipeline, ["a"], [0], num_inference_steps=most + 1, guidance_scale=1.0, height=16, width=16)


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


def test_negative_prompts_in_the_forms_of_the_prompts() -> None:
    """Texts or embeddings, whichever a family gives; they are refused where they would have no effect."""
    calls: list[dict[str, Any]] = []

    class Pipeline:
        def __call__(self, negative_prompt: Any = None, **arguments: Any) -> SimpleNamespace:
            calls.append({"negative_prompt": negative_prompt, **arguments})
            return SimpleNamespace(images=[])

    def embeddings(prompts: list[str], scale: float) -> dict[str, Any]:
        return {"prompt_embeds": prompts, "prompt_attention_mask": len(prompts), "max_sequence_length": 1}

    options: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 4.0, "batch_size": 2}
    generate(Pipeline(), ["a", "b", "c"], [5, 6, 7], negative_prompts=["x", "", "z"], **options)  # type: ignore[arg-type]
    assert [call["negative_prompt"] for call in calls] == [["x", ""], ["z"]]
    generate(Pipeline(), ["a"], [5], negative_prompts=["x"], prompt_inputs=embeddings, **options)  # type: ignore[arg-type]
    assert calls[-1]["negative_prompt_embeds"] == ["x"]
    assert calls[-1]["negative_prompt_attention_mask"] == 1
    assert "negative_max_sequence_length" not in calls[-1]
    check_negative_prompts(StableDiffusionXLPipeline, [""], 1.0)
    with pytest.raises(UserError, match=r"guidance at guidance_scale=1.0, .* no effect; set guidance_scale above 1"):
        check_negative_prompts(StableDiffusionXLPipeline, ["x"], 1.0)
    with pytest.raises(UserError, match=r"guidance at guidance_scale=4.0, .* no effect; leave it out"):
        check_negative_prompts(FluxPipeline, ["x"], 4.0, guided=False)
    with pytest.raises(UserError, match=r"Flux2Pipeline takes no negative prompt; leave it out"):
        check_negative_prompts(Flux2Pipeline, ["x"], 4.0)


def test_a_grid_of_images_of_several_sizes() -> None:
    grid = image_grid([Image.new("RGB", (2, 4), "white"), Image.new("RGB", (4, 2), "red")], columns=2)
    assert grid.shape == (3, 4 + 4, 2 * (4 + 2) + 2)
    assert grid.sum() == 3 * 8 + 8
