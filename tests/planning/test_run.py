"""What is planned of a run."""

from __future__ import annotations

from lit_lora.planning.run import Sampling
from lit_lora.prompts import Prompt


def test_the_largest_image_is_planned_also_where_some_prompts_leave_their_size_open() -> None:
    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": None, "width": None}
    small, large, own = (Prompt("a", height=size, width=size) for size in (32, 96, None))
    for prompts, size in (([small], 32), ([small, large], 96), ([small, own], 64), ([large, own], 96), ([own], 64)):
        assert Sampling.of(prompts, options).size(64) == (size, size)
