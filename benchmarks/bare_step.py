"""The training step in plain PyTorch, diffusers and PEFT, to measure ours against."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FluxPipeline


class Bare:
    """The training step in plain PyTorch.

    Args:
        module: Module whose loaded parts are copied in structure: a module of the same family without quantization.
        batch: The batch of every step, on the device.
        dtype: dtype of the frozen weights.
    """

    def __init__(self, module: Any, batch: dict[str, Any], dtype: Any) -> None:
        self.family, self.batch, self.dtype = module.family, batch, dtype
        self.parameters = [parameter for parameter in self.family.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def step(self) -> None:
        """One optimizer step."""
        device = self.family.device
        with torch.no_grad(), torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            inputs, target = self.prepared(device)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            prediction = self.family.denoiser(**inputs).sample
        F.mse_loss(prediction.float(), target.float()).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def prepared(self, device: Any) -> tuple[dict[str, Any], Any]:
        """The denoiser's inputs, and what it shall predict."""
        scheduler = DDPMScheduler.from_config(self.family.scheduler_config)
        latents, inputs = self._encoded(device)
        noise = torch.randn_like(latents)
        t = torch.randint(1000, (len(latents),), device=device)
        return {"sample": scheduler.add_noise(latents, noise, t), "timestep": t, **inputs}, noise

    def _encoded(self, device: Any) -> tuple[Any, dict[str, Any]]:
        """Latents, and the denoiser's inputs that come of captions."""
        batch, encoders = self.batch, self.family.encoders
        if "latents_mean" in batch:
            mean = batch["latents_mean"]
            latents = mean + batch["latents_std"] * torch.randn_like(mean)
            hidden, pooled = batch["text_embeddings"]["encoder_hidden_states"], batch["text_embeddings"].get("pooled")
        else:
            vae = self.family.vae
            pixels = batch["pixel_values"].to(vae.dtype) / 127.5 - 1
            latents = vae.encode(pixels).latent_dist.sample()
            states = []
            for suffix in ("", "_2"):
                if f"tokenizer{suffix}" in encoders:
                    ids = encoders[f"tokenizer{suffix}"](
                        batch["caption"], padding="max_length", truncation=True, return_tensors="pt"
                    ).input_ids
                    states.append(encoders[f"text_encoder{suffix}"](ids.to(device), output_hidden_states=True))
            hidden = states[0][0] if len(states) == 1 else torch.cat([one.hidden_states[-2] for one in states], dim=-1)
            pooled = None if len(states) == 1 else states[-1][0]
        latents = latents.to(self.dtype) * self.family.vae_config["scaling_factor"]
        inputs = {"encoder_hidden_states": hidden.to(self.dtype)}
        if pooled is not None:
            ids = torch.tensor([[128, 128, 0, 0, 128, 128]] * len(latents), device=device)
            inputs["added_cond_kwargs"] = {"text_embeds": pooled.to(self.dtype), "time_ids": ids}
        return latents, inputs


class BareFlux(Bare):
    """The step of FLUX.1, on latents and text embeddings from a cache; for the arguments see :class:`Bare`."""

    def prepared(self, device: Any) -> tuple[dict[str, Any], Any]:
        config, text = self.family.vae_config, self.batch["text_embeddings"]
        mean = self.batch["latents_mean"]
        latents = mean + self.batch["latents_std"] * torch.randn_like(mean)
        latents = ((latents - config["shift_factor"]) * config["scaling_factor"]).to(self.dtype)
        noise = torch.randn_like(latents)
        t = torch.sigmoid(torch.randn(len(latents), device=device))
        sigma = t[:, None, None, None].to(self.dtype)
        count, channels, height, width = latents.shape
        pack = FluxPipeline._pack_latents
        inputs = {
            "hidden_states": pack((1 - sigma) * latents + sigma * noise, count, channels, height, width),
            "timestep": t,
            "guidance": torch.ones(count, device=device),
            "pooled_projections": text["pooled"].to(self.dtype),
            "encoder_hidden_states": text["encoder_hidden_states"].to(self.dtype),
            "txt_ids": torch.zeros(text["encoder_hidden_states"].shape[1], 3, device=device),
            "img_ids": FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, device, torch.float32),
        }
        return inputs, pack(noise - latents, count, channels, height, width)
