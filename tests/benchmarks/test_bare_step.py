"""The plain steps that ours are measured against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from benchmarks.bare_step import Bare, BareFlux
from benchmarks.short_training import cached_batch, draw_weights
from lit_lora import Flux, LoraDiffusion, StableDiffusion
from lit_lora.families.packing import unpack

PLAIN = {"text_width": 16}
FLUX = {"text_width": 32, "pooled_width": 16, "tokens": 6}


@pytest.mark.parametrize(
    ("folder", "family", "kind", "sizes"),
    [("sd_folder", StableDiffusion, Bare, PLAIN), ("flux_folder", Flux, BareFlux, FLUX)],
)
def test_the_bare_step_predicts_as_ours_and_learns(
    folder: str, family: Any, kind: type[Bare], sizes: dict[str, int], request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(folder)
    module = draw_weights(
        LoraDiffusion(family(str(path)), LoraConfig(r=2, init_lora_weights="gaussian"), base_dtype="float32"), True
    )
    module.configure_model()
    batch = cached_batch(2, 32, **sizes, downsampling=module.family.vae_scale_factor)
    bare = kind(module, batch, torch.float32)
    torch.manual_seed(0)
    inputs, target = bare.prepared(torch.device("cpu"))
    with torch.no_grad():
        theirs = module.family.denoiser(**inputs).sample
        assert theirs.shape == target.shape
        noisy, t = inputs.get("sample"), inputs["timestep"]
        if noisy is None:
            size = batch["latents_mean"].shape[-2:]
            noisy, theirs, t = unpack(inputs["hidden_states"], *size), unpack(theirs, *size), 1000 * t
        conditioning = module.family.conditioning(batch["text_embeddings"], batch, noisy)
        torch.testing.assert_close(module.family.denoise(noisy, t, conditioning), theirs)
    before = [parameter.detach().clone() for parameter in bare.parameters]
    bare.step()
    assert any(not torch.equal(one, other) for one, other in zip(before, bare.parameters, strict=True))
