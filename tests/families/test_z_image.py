"""Z-Image against its pipeline, and its training step against that of ``train_dreambooth_lora_z_image.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from lit_lora.draws import Draws
from lit_lora.errors import UserError
from lit_lora.families import ZImage
from tests.families.own_pipeline import overfit
from tests.families.test_flow_parity import DENSITIES, Reference, check, module_of
from tests.helpers import make_batches

CAPTIONS = ["a red star on white", "", "two", "a caption that is longer than the others " * 20]


@pytest.fixture(scope="module")
def pipeline(z_image_folder: Path) -> Any:
    loaded = ZImagePipeline.from_pretrained(z_image_folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def family(z_image_folder: Path) -> ZImage:
    family = ZImage(str(z_image_folder), max_sequence_length=96)
    family.load(torch.float32)
    return family


def test_captions_are_encoded_as_in_the_pipeline(family: ZImage, pipeline: Any) -> None:
    ours = family.encode_captions(CAPTIONS)
    theirs, _ = pipeline.encode_prompt([*CAPTIONS], do_classifier_free_guidance=False, max_sequence_length=96)
    given = family.conditioning(ours, {}, torch.zeros(4, 4, 8, 8))["cap_feats"]
    assert [len(one) for one in given] == [len(one) for one in theirs]
    assert len({len(one) for one in theirs}) == 4
    assert len(theirs[-1]) == 96  # cut off
    for one, other in zip(given, theirs, strict=True):
        assert torch.equal(one, other)
    assert ours["encoder_hidden_states"].shape == (4, 96, 32)
    assert not ours["encoder_hidden_states"][ours["mask"] == 0].any()


class ZImageReference(Reference):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "none")
        self.pipeline = ZImagePipeline.from_pretrained(folder)
        self.transformer = self.pipeline.transformer

    def embeddings(self, captions: list[str]) -> Any:
        return self.pipeline.encode_prompt([*captions], max_sequence_length=96)[0]

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Any) -> Tensor:
        images = list(noisy.unsqueeze(2).unbind(dim=0))
        predictions = self.transformer(images, (1000 - timesteps) / 1000, text, return_dict=False)[0]
        return -torch.stack(predictions, dim=0).squeeze(2)


@pytest.mark.parametrize("density", ["uniform", "logit_normal"])
def test_the_training_step_is_that_of_the_script(density: str, z_image_folder: Path) -> None:
    module = module_of(ZImage(str(z_image_folder), max_sequence_length=96), density=DENSITIES[density])
    check(module, ZImageReference(z_image_folder), density)


class Exact:
    """``forward`` of a denoiser with the exact velocity from an image's latents to noise; it keeps the inputs of each step."""

    def __init__(self, latents: Tensor, noise: Tensor) -> None:
        self.velocity, self.inputs = noise - latents, list[Any]()

    def __call__(self, x: list[Tensor], t: Tensor, cap_feats: list[Tensor], return_dict: bool = True, **_: Any) -> Any:
        self.inputs.append((x, t, cap_feats))
        predictions = list(-self.velocity.unsqueeze(2))
        return Transformer2DModelOutput(predictions) if return_dict else (predictions,)


def test_the_exact_velocity_leads_to_the_exact_latents(
    family: ZImage, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The denoiser gets in training what it gets in the pipeline, and its prediction is read in the same way."""
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    exact = Exact(latents, noise)
    for denoiser in (pipeline.transformer, family.denoiser):
        monkeypatch.setattr(denoiser, "forward", exact)
    prompts = CAPTIONS[:2]
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}
    drawn = pipeline(**family.prompt_inputs([*prompts], 1.0), latents=noise, **options).images
    torch.testing.assert_close(drawn, latents)

    conditioning = family.conditioning(family.encode_captions(prompts), {}, latents)
    for given, timestep in zip([*exact.inputs], pipeline.scheduler.timesteps, strict=True):
        noisy = torch.stack(given[0]).squeeze(2)
        velocity = family.denoise(noisy, timestep.expand(2), conditioning)
        assert torch.equal(velocity, noise - latents)
        torch.testing.assert_close(exact.inputs[-1], given)
        # One Euler step over the rest of the way.
        torch.testing.assert_close(noisy - timestep / 1000 * velocity, latents)


def test_an_image_is_learned(z_image_folder: Path) -> None:
    family = ZImage(str(z_image_folder), max_sequence_length=32)
    family.load(torch.float32)
    assert overfit(family, 100, 1e-2, size=8) < 0.5


def test_padding_does_not_matter(family: ZImage) -> None:
    """What a cache gives back, embeddings with zeros for padding, is denoised as the embeddings themselves."""
    batch = make_batches(1)[0]
    text = family.encode_captions(batch["caption"])
    hidden = torch.where(text["mask"].unsqueeze(-1) == 1, text["encoder_hidden_states"], 3)
    other = {**text, "encoder_hidden_states": hidden}
    results = []
    for embeddings in (text, other):
        latents, conditioning = family.encode({**batch, "text_embeddings": embeddings}, Draws(0, batch["slot"]))
        results.append(family.denoise(latents, torch.tensor([100.0, 900.0]), conditioning))
    assert torch.equal(*results)


def test_turbo_is_distilled(z_image_folder: Path) -> None:
    family = ZImage(str(z_image_folder))
    family.read_configs()
    assert not family.is_distilled
    family.scheduler_config["shift"] = 3.0
    assert family.is_distilled


def test_guidance_in_the_pipelines_way(family: ZImage, pipeline: Any) -> None:
    for scale, expected, passes in ((1.0, 0.0, 1), (0.0, 0.0, 1), (5.0, 4.0, 2)):
        inputs = family.prompt_inputs(["a"], scale)
        assert inputs["guidance_scale"] == expected
        pipeline._guidance_scale = inputs["guidance_scale"]
        assert family.sampling_passes(scale) == 1 + pipeline.do_classifier_free_guidance == passes


def test_a_length_that_is_too_small() -> None:
    with pytest.raises(UserError, match="max_sequence_length=0"):
        ZImage("somewhere", max_sequence_length=0)


def test_sizes(family: ZImage) -> None:
    assert (family.size_multiple, family.default_size, family.num_tokens((4, 8, 6))) == (4, 1024, 12)
