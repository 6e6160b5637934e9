"""The step of flow-matching families against that of diffusers' scripts, written out here without this project's code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from peft import LoraConfig
from peft.utils import set_peft_model_state_dict
from torch import Tensor

from lit_lora.draws import Draws
from lit_lora.families import Flux, StableDiffusion3
from lit_lora.module import LoraDiffusion
from lit_lora.objectives import (
    CosMap,
    CosMapWeighting,
    FlowMatching,
    LogitNormal,
    Mode,
    SigmaSqrt,
    TimestepDensity,
    Uniform,
)
from tests.helpers import make_batches
from tests.test_parity import adapter_of
from tests.tiny_pipelines import write_flux

DENSITIES: dict[str, TimestepDensity] = {
    "uniform": Uniform(),
    "logit_normal": LogitNormal(0.3, 0.8),
    "mode": Mode(0.7),
    "cosmap": CosMap(),
}
WEIGHTINGS = {"none": None, "sigma_sqrt": SigmaSqrt(), "cosmap": CosMapWeighting()}


def times_of(density: str, draws: Draws) -> Tensor:
    if density == "logit_normal":
        return 1 / (1 + torch.exp(-(0.3 + 0.8 * draws.normal("timestep", ()))))
    u = draws.uniform("timestep")
    if density == "mode":
        return 1 - u - 0.7 * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return u if density == "uniform" else 1 - 1 / (torch.tan(math.pi * u / 2) + 1)


class Reference:
    """``train_dreambooth_lora_{sd3,flux}.py``, fp32 on the CPU, with draws given from outside.

    Densities are drawn as times of noise, the scripts' ``u`` counts from the other end.
    """

    transformer: Any
    vae_class: Any = AutoencoderKL

    def __init__(self, folder: Path, weighting: str, precondition_outputs: bool = False) -> None:
        self.vae = self.vae_class.from_pretrained(folder, subfolder="vae")
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        self.weighting, self.precondition_outputs = weighting, precondition_outputs

    def adapt(self, targets: tuple[str, ...], state: dict[str, Tensor]) -> None:
        self.transformer.requires_grad_(False)
        self.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=list(targets)))
        set_peft_model_state_dict(self.transformer, state)

    def step(self, batch: dict[str, Any], draws: Draws, density: str) -> tuple[float, dict[str, Tensor]]:
        with torch.no_grad():
            latents = self.latents(batch, draws)
            text = self.embeddings(batch["caption"])
        noise = draws.normal("noise", (4, 8, 8))
        indices = ((1 - times_of(density, draws)) * 1000).long()
        timesteps = self.scheduler.timesteps[indices]
        sigmas = self.scheduler.sigmas[indices].view(-1, 1, 1, 1)
        noisy = (1.0 - sigmas) * latents + sigmas * noise
        prediction = self.predict(noisy, timesteps, text)
        target = noise - latents
        if self.precondition_outputs:
            prediction, target = prediction * (-sigmas) + noisy, latents
        weight = {
            "none": torch.ones_like(sigmas),
            "sigma_sqrt": sigmas**-2.0,
            "cosmap": 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2)),
        }[self.weighting]
        loss = torch.mean((weight * (prediction - target) ** 2).reshape(len(target), -1), 1).mean()
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in self.transformer.named_parameters() if p.requires_grad}

    def latents(self, batch: dict[str, Any], draws: Draws) -> Tensor:
        posterior = self.vae.encode(batch["pixel_values"].float() / 127.5 - 1).latent_dist
        latents: Tensor = posterior.mean + posterior.std * draws.normal("posterior", (4, 8, 8))
        return (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def embeddings(self, captions: list[str]) -> Any:
        raise NotImplementedError

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Any) -> Tensor:
        raise NotImplementedError


class SD3Reference(Reference):
    def __init__(self, folder: Path, *args: Any) -> None:
        super().__init__(folder, *args)
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
        self.transformer = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")

    def embeddings(self, captions: list[str]) -> Any:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(captions, captions, captions, max_sequence_length=20)
        return embeds, pooled

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Any) -> Tensor:
        prediction: Tensor = self.transformer(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=text[0],
            pooled_projections=text[1],
            return_dict=False,
        )[0]
        return prediction


class FluxReference(Reference):
    guidance_scale = 3.5

    def __init__(self, folder: Path, *args: Any) -> None:
        super().__init__(folder, *args)
        self.pipeline = FluxPipeline.from_pretrained(folder)
        self.transformer = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")

    def embeddings(self, captions: list[str]) -> Any:
        return self.pipeline.encode_prompt(captions, captions, max_sequence_length=24)

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Any) -> Tensor:
        embeds, pooled, text_ids = text
        batch, channels, height, width = noisy.shape
        guidance = torch.tensor([self.guidance_scale]).expand(batch)
        prediction = self.transformer(
            hidden_states=FluxPipeline._pack_latents(noisy, batch, channels, height, width),
            timestep=timesteps / 1000,
            guidance=guidance if self.transformer.config.guidance_embeds else None,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32),
            return_dict=False,
        )[0]
        unpacked: Tensor = FluxPipeline._unpack_latents(prediction, height * 2, width * 2, 2)
        return unpacked


def check(module: LoraDiffusion, reference: Reference, density: str) -> None:
    """Three steps' losses and gradients are equal; the adapter does not begin with zeros."""
    module.configure_model()
    module.train()
    reference.adapt(module.family.default_targets, adapter_of(module))
    for batch in make_batches(3):
        draws = Draws(5, batch["slot"])
        loss, gradients = reference.step(batch, draws, density)
        losses, _ = module.losses(batch, draws)
        losses.mean().backward()
        assert losses.mean().item() == pytest.approx(loss, rel=1e-5)
        ours = {n: p.grad for n, p in module.family.denoiser.get_base_model().named_parameters() if p.requires_grad}
        assert ours.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
        # In the last block of SD 3 nobody reads what the text's queries make.
        assert sum(bool(gradient.any()) for gradient in gradients.values()) >= len(gradients) - 4
        module.zero_grad()
        reference.transformer.zero_grad()


def module_of(family: Any, **options: Any) -> LoraDiffusion:
    torch.manual_seed(9)
    adapter = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False)
    return LoraDiffusion(family, adapter, FlowMatching(**options), base_dtype="float32")


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("precondition_outputs", [False, True])
def test_stable_diffusion_3(density: str, weighting: Any, precondition_outputs: bool, sd3_folder: Path) -> None:
    family = StableDiffusion3(str(sd3_folder), max_sequence_length=20)
    options = {"weighting": WEIGHTINGS[weighting], "precondition_outputs": precondition_outputs}
    module = module_of(family, density=DENSITIES[density], **options)
    check(module, SD3Reference(sd3_folder, weighting, precondition_outputs), density)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_flux_with_guidance(density: str, weighting: Any, flux_folder: Path) -> None:
    family = Flux(str(flux_folder), train_guidance_scale=3.5, max_sequence_length=24)
    # The script trains with the scheduler's timesteps as they are, which are not shifted under dynamic shifting.
    module = module_of(family, density=DENSITIES[density], weighting=WEIGHTINGS[weighting], shift=1.0)
    check(module, FluxReference(flux_folder, weighting), density)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.filterwarnings("ignore:.*is distilled")
def test_flux_without_guidance(density: str, tmp_path: Path, tokenizer: Any) -> None:
    folder = write_flux(tmp_path / "schnell", tokenizer, guidance=False)
    module = module_of(Flux(str(folder), max_sequence_length=24), density=DENSITIES[density])
    check(module, FluxReference(folder, "none"), density)
