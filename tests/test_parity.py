"""The training step against diffusers' reference step, written out here once more without this project's code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lit_lora.draws import Draws
from lit_lora.families import ModelFamily, StableDiffusion, StableDiffusionXL
from lit_lora.module import LoraDiffusion
from lit_lora.objectives import DDPM, MinSNR, OffsetNoise
from tests.helpers import loader_of, make_batches

STEPS = 10
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


class Reference:
    """``train_text_to_image_lora{,_sdxl}.py`` of diffusers, fp32 on the CPU, with draws given from outside."""

    def __init__(self, folder: Path, xl: bool, prediction_type: str, snr_gamma: float | None, noise_offset: float):
        self.xl = xl
        self.prediction_type, self.snr_gamma, self.noise_offset = prediction_type, snr_gamma, noise_offset
        self.vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
        if xl:
            self.text_encoder_2 = CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder_2")
        self.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        self.unet.requires_grad_(False)
        self.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=TARGETS))
        self.unet.train()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        self.alphas_cumprod = torch.cumprod(1 - betas, 0)
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-2, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)

    def step(self, batch: dict[str, Any], draws: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        with torch.no_grad():
            posterior = self.vae.encode(batch["pixel_values"].float() / 127.5 - 1).latent_dist
            latents = (posterior.mean + posterior.std * draws["posterior"]) * self.vae.config.scaling_factor
            conditioning = self.conditioning(batch)
        noise = draws["noise"] + self.noise_offset * draws["noise offset"]
        t = draws["timestep"]
        alpha = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        epsilon = self.prediction_type == "epsilon"
        target = noise if epsilon else alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        prediction = self.unet(noisy, t, **conditioning).sample
        if self.snr_gamma is None:
            loss = F.mse_loss(prediction.float(), target.float())
        else:
            snr = self.alphas_cumprod[t] / (1 - self.alphas_cumprod[t])
            weight = torch.minimum(snr, torch.full_like(snr, self.snr_gamma)) / (snr if epsilon else snr + 1)
            loss = (F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3)) * weight).mean()
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in self.unet.named_parameters() if p.requires_grad}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), gradients

    def conditioning(self, batch: dict[str, Any]) -> dict[str, Any]:
        ids = self.tokenizer(
            batch["caption"], padding="max_length", truncation=True, max_length=32, return_tensors="pt"
        ).input_ids
        if not self.xl:
            return {"encoder_hidden_states": self.text_encoder(ids)[0]}
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids, output_hidden_states=True)
        size = batch["pixel_values"].shape[-1]
        time_ids = [
            [*original, *corner, size, size]
            for original, corner in zip(batch["original_size"].tolist(), batch["crop_top_left"].tolist(), strict=True)
        ]
        return {
            "encoder_hidden_states": torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1),
            "added_cond_kwargs": {"text_embeds": second[0], "time_ids": torch.tensor(time_ids).float()},
        }


class Recorder(Callback):
    """Every step's loss and gradients, and the adapter before the first."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.initial = adapter_of(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        parameters = pl_module.family.denoiser.get_base_model().named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in parameters if p.requires_grad})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].item())


def adapter_of(module: LightningModule) -> dict[str, Tensor]:
    state = get_peft_model_state_dict(module.family.denoiser.get_base_model())
    return {key: value.clone() for key, value in state.items()}


def draws_of(batch: dict[str, Any], seed: int) -> dict[str, Tensor]:
    draws = Draws(seed, batch["slot"])
    return {
        "posterior": draws.normal("posterior", (4, 8, 8)),
        "noise": draws.normal("noise", (4, 8, 8)),
        "noise offset": draws.normal("noise offset", (4, 1, 1)),
        "timestep": draws.integers("timestep", 1000),
    }


@pytest.mark.parametrize("noise_offset", [0.0, 0.1])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("family_class", [StableDiffusion, StableDiffusionXL])
def test_step_equals_the_reference_step(
    family_class: type[ModelFamily],
    prediction_type: Any,
    snr_gamma: float | None,
    noise_offset: float,
    sd_folder: Path,
    sdxl_folder: Path,
    trainer_options: dict[str, Any],
) -> None:
    xl = family_class is StableDiffusionXL
    folder = sdxl_folder if xl else sd_folder
    batches = make_batches(STEPS)
    module = LoraDiffusion(
        family_class(str(folder)),
        LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=TARGETS),
        DDPM(
            prediction_type,
            weighting=snr_gamma and MinSNR(snr_gamma),
            noise=[OffsetNoise(noise_offset)] if noise_offset else [],
        ),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8),
        base_dtype="float32",
        seed=5,
    )
    recorder = Recorder()
    Trainer(max_steps=STEPS, callbacks=[recorder], **trainer_options).fit(module, loader_of(batches))

    reference = Reference(folder, xl, prediction_type, snr_gamma, noise_offset)
    set_peft_model_state_dict(reference.unet, recorder.initial)
    for number, batch in enumerate(batches):
        loss, gradients = reference.step(batch, draws_of(batch, seed=5))
        assert recorder.losses[number] == pytest.approx(loss, rel=1e-5)
        assert recorder.gradients[number].keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(recorder.gradients[number][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    expected = get_peft_model_state_dict(reference.unet)
    trained = adapter_of(module)
    assert trained.keys() == expected.keys()
    for name, value in expected.items():
        assert not torch.equal(value, recorder.initial[name])
        # Where a gradient is about zero, AdamW steps by its rounding error, which is another on other processors.
        assert torch.isclose(trained[name], value, rtol=1e-4, atol=1e-5).float().mean() > 0.99
        torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-3)
