"""Sana against SanaPipeline and diffusers' script for LoRA: text, one training step, sampling."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from torch import Tensor

from lit_lora.draws import Draws
from lit_lora.errors import UserError
from lit_lora.families import Sana
from tests.families.own_pipeline import check_exact_prediction, overfit
from tests.families.test_flow_parity import DENSITIES, Reference, check, module_of
from tests.families.tiny import sana
from tests.helpers import make_batches

CAPTIONS = [" A Red Star", "b", "two blue circles and one green square"]
INSTRUCTION = ["say what is seen", "say it well and at length", "prompt "]


def loaded(folder: Path, **options: Any) -> Sana:
    family = Sana(str(folder), **{"max_sequence_length": 24} | options)
    family.load(torch.float32)
    return family


@pytest.fixture
def family(sana_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Sana:
    """With a short instruction of many tokens: the tiny tokenizer knows each line of the pipeline's as one."""
    monkeypatch.setattr("lit_lora.families.sana._INSTRUCTION", INSTRUCTION)
    return loaded(sana_folder)


class SanaReference(Reference):
    """``train_dreambooth_lora_sana.py``, fp32 on the CPU, with draws given from outside."""

    def __init__(self, folder: Path) -> None:
        self.vae: Any = AutoencoderDC.from_pretrained(folder, subfolder="vae")
        # The script makes it of the pipeline's DPM-Solver, whose flow_shift it does not know.
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        self.weighting, self.precondition_outputs = "none", False
        self.pipeline: Any = SanaPipeline.from_pretrained(folder)
        self.transformer = SanaTransformer2DModel.from_pretrained(folder, subfolder="transformer")

    def latents(self, batch: dict[str, Any], draws: Draws) -> Tensor:
        latents: Tensor = self.vae.encode(batch["pixel_values"].float() / 127.5 - 1).latent
        return latents * self.vae.config.scaling_factor

    def embeddings(self, captions: list[str]) -> Any:
        return self.pipeline.encode_prompt(captions, max_sequence_length=24, complex_human_instruction=INSTRUCTION)[:2]

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Any) -> Tensor:
        prediction: Tensor = self.transformer(
            hidden_states=noisy,
            encoder_hidden_states=text[0],
            encoder_attention_mask=text[1],
            timestep=timesteps,
            return_dict=False,
        )[0]
        return prediction


def test_a_step_is_that_of_the_script(family: Sana, sana_folder: Path) -> None:
    module = module_of(Sana(str(sana_folder), max_sequence_length=24), density=DENSITIES["logit_normal"], shift=1.0)
    check(module, SanaReference(sana_folder), "logit_normal")


def test_the_shift_is_that_of_the_scheduler(sana_folder: Path) -> None:
    module = module_of(Sana(str(sana_folder)))
    module.objective.prepare(module.family.source.config_of("scheduler"))
    assert module.objective.shift_for(64) == 3.0


@pytest.mark.parametrize("instruction", [True, False])
def test_text_is_that_of_the_pipeline(instruction: bool, family: Sana) -> None:
    family.complex_human_instruction = instruction
    given = INSTRUCTION if instruction else None
    pipeline: Any = family.pipeline()
    embeds, mask, negative, negative_mask = pipeline.encode_prompt(
        CAPTIONS, max_sequence_length=24, complex_human_instruction=given
    )
    ours, empty = family.encode_captions(CAPTIONS), family.encode_captions([""] * 3)
    for text, expected, expected_mask in ((ours, embeds, mask), (empty, negative, negative_mask)):
        assert torch.equal(text["encoder_hidden_states"], expected)
        assert torch.equal(text["mask"], expected_mask)
    assert len(set(mask.sum(1).tolist())) == 3
    mixed = family.encode_captions([*CAPTIONS[:2], ""])
    assert torch.equal(mixed["encoder_hidden_states"], torch.cat([embeds[:2], negative[2:]]))
    assert torch.equal(mixed["mask"], torch.cat([mask[:2], negative_mask[2:]]))


def test_the_instruction_is_the_pipelines_own(sana_folder: Path) -> None:
    family = loaded(sana_folder)
    own = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    assert family.prompt_inputs(["a star"], 1.0)["complex_human_instruction"] == own
    pipeline: Any = family.pipeline()
    embeds, _, _, _ = pipeline.encode_prompt("a star", False, max_sequence_length=24, complex_human_instruction=own)
    assert torch.equal(family.encode_captions(["a star"])["encoder_hidden_states"], embeds)


def test_an_exact_velocity_gives_the_exact_latents(family: Sana) -> None:
    noise, latents = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    scheduler = family.pipeline().scheduler
    scheduler.set_timesteps(3)
    sigma = scheduler.sigmas[0]  # not quite 1
    start = (1 - sigma) * latents + sigma * noise
    for scale in (1.0, 0.001):
        family.denoiser.register_to_config(timestep_scale=scale)
        family.denoiser_config["timestep_scale"] = scale
        check_exact_prediction(family, start, latents, noise - latents, size=32)


def test_an_image_that_is_learned_is_drawn(tmp_path: Path) -> None:
    """With position embeddings, as Sana has at 4096 px: without them an image of noise takes long to learn."""
    folder = sana.write(tmp_path / "sana", patch_size=2, interpolation_scale=1)
    family = loaded(folder, complex_human_instruction=False)
    assert overfit(family, 200, 0.02, size=32, count=4) < 0.4


def test_latents_are_those_of_the_autoencoder(family: Sana) -> None:
    """They have no randomness, and go back to images by its own factor."""
    images = make_batches(1)[0]["pixel_values"].float() / 127.5 - 1
    mean, std = family.posterior(images)
    encoded = family.vae.encode(images).latent
    assert torch.equal(mean, encoded)
    assert not std.any()
    latents = family.latents({"pixel_values": images}, Draws(0, [0, 1]))
    torch.testing.assert_close(latents, encoded * family.vae.config.scaling_factor)
    torch.testing.assert_close(family.decode(latents), family.vae.decode(encoded).sample)


def test_padding_does_not_matter(family: Sana) -> None:
    """What a cache gives back, embeddings with zeros for padding, is denoised as the embeddings themselves."""
    batch = make_batches(1)[0] | {"caption": ["a star", ""]}
    text = family.encode_captions(batch["caption"])
    kept = text["encoder_hidden_states"] * text["mask"][..., None]
    results = []
    for hidden in (text["encoder_hidden_states"], kept, kept * 0):
        embeddings = {**text, "encoder_hidden_states": hidden}
        latents, conditioning = family.encode({**batch, "text_embeddings": embeddings}, Draws(0, batch["slot"]))
        results.append(family.denoise(latents, torch.tensor([100.0, 900.0]), conditioning))
    torch.testing.assert_close(results[1], results[0])
    assert not torch.allclose(results[2], results[0])


def test_draws_in_its_default_size(sana_folder: Path) -> None:
    """The pipeline itself takes no empty height and width."""
    family = loaded(sana_folder, complex_human_instruction=False)
    family.denoiser_config["sample_size"] = 16
    (image,) = family.generate(["a star"], [0], num_inference_steps=1, guidance_scale=1.0)
    assert image.size == (32, 32)


def test_too_few_tokens() -> None:
    with pytest.raises(UserError, match="max_sequence_length=1 is too small; it must be at least 2"):
        Sana("base", max_sequence_length=1)
