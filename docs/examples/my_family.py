"""A custom model family: a small made-up transformer, trained by flow matching, whose captions have a mask.

With this file on PYTHONPATH (or beside the config), a config names it:

    model:
      family:
        class_path: my_family.MyFamily
        init_args: {pretrained_model_name_or_path: my_model}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from lit_lora import FlowMatching, ModelFamily, Objective
from lit_lora.families import Batch, Conditioning

# The model. Shapes: B images, C channels, h x w latents, N image tokens, T text tokens, D features.


class MyBlock(nn.Module):
    """Attention from image tokens to image and text tokens, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Updated image tokens ``(B, N, D)``, given text tokens ``(B, T, D)`` and their mask ``(B, T)``."""
        both = torch.cat([self.norm(image), text], dim=1)
        seen = torch.cat([mask.new_ones(image.shape[:2]), mask], dim=1).bool()[:, None, None]
        query, key, value = (
            x[:, None] for x in (self.to_q(both[:, : image.shape[1]]), self.to_k(both), self.to_v(both))
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)[:, 0]
        image = image + self.to_out(attended)
        return image + self.mlp(image)


class MyTransformer(ModelMixin, ConfigMixin):
    """Predicts the velocity of latents in patches of 2 x 2; time runs from 0 (data) to 1 (noise)."""

    @register_to_config
    def __init__(self, in_channels: int = 5, patch_size: int = 2, width: int = 32, text_width: int = 16) -> None:
        super().__init__()
        self.into = nn.Conv2d(in_channels, width, patch_size, patch_size)
        self.time = nn.Linear(1, width)
        self.text = nn.Linear(text_width, width)
        self.blocks = nn.ModuleList([MyBlock(width) for _ in range(2)])
        self.out = nn.ConvTranspose2d(width, in_channels, patch_size, patch_size)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
    ) -> Transformer2DModelOutput:
        """Velocity ``(B, C, h, w)`` of ``hidden_states``, ``(B, C, h, w)``, at ``timestep``, ``(B,)`` in [0, 1]."""
        grid = self.into(hidden_states)
        image = grid.flatten(2).transpose(1, 2) + self.time(timestep[:, None].to(grid.dtype))[:, None]
        text = self.text(encoder_hidden_states)
        for block in self.blocks:
            image = block(image, text, encoder_attention_mask)
        return Transformer2DModelOutput(sample=self.out(image.transpose(1, 2).view_as(grid)))


# The pipeline, in the form of diffusers' own.


def encode(tokenizer: CLIPTokenizer, encoder: CLIPTextModel, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Hidden states ``(B, T, D)`` of captions, and their mask ``(B, T)``."""
    options = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
    tokens = tokenizer(captions, return_tensors="pt", **options).to(encoder.device)
    return encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0], tokens.attention_mask


class MyPipeline(DiffusionPipeline):
    """Draws images with a :class:`MyTransformer`."""

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        transformer: MyTransformer,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer, scheduler=scheduler
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        num_inference_steps: int,
        guidance_scale: float,
        height: int | None,
        width: int | None,
        generator: list[torch.Generator],
    ) -> ImagePipelineOutput:
        """One image for each prompt."""
        hidden, mask = encode(self.tokenizer, self.text_encoder, prompt)
        empty, empty_mask = encode(self.tokenizer, self.text_encoder, [""] * len(prompt))
        shape = (self.transformer.config.in_channels, (height or 16) // 2, (width or 16) // 2)
        latents = torch.stack([torch.randn(shape, generator=one) for one in generator]).to(self.device)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        for timestep in self.scheduler.timesteps:
            time = (timestep / 1000).expand(len(latents))
            velocity = self.transformer(latents, time, hidden, mask).sample
            if guidance_scale > 1:
                plain = self.transformer(latents, time, empty, empty_mask).sample
                velocity = plain + guidance_scale * (velocity - plain)
            latents = self.scheduler.step(velocity, timestep, latents).prev_sample
        images = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return ImagePipelineOutput(images=VaeImageProcessor().postprocess(images.detach()))


# The family: everything that lit_lora needs to know about the model.


class MyFamily(ModelFamily):
    """Models of :class:`MyPipeline`."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = MyPipeline
    denoiser_class: ClassVar[type[nn.Module]] = MyTransformer
    denoiser_name: ClassVar[str] = "transformer"
    encoder_classes: ClassVar[dict[str, type[Any]]] = {"tokenizer": CLIPTokenizer, "text_encoder": CLIPTextModel}
    block_classes: ClassVar[tuple[str, ...]] = ("MyBlock",)
    default_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out")
    default_objective: ClassVar[type[Objective]] = FlowMatching
    text_masks: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "mask"}

    @property
    def size_multiple(self) -> int:
        return self.vae_scale_factor * int(self.denoiser_config["patch_size"])

    @property
    def default_size(self) -> int:
        return 16

    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        hidden, mask = encode(self.encoders["tokenizer"], self.encoders["text_encoder"], captions)
        return {"encoder_hidden_states": hidden, "mask": mask}

    def conditioning(self, text: Mapping[str, Tensor], batch: Batch, latents: Tensor) -> Conditioning:
        return {
            "encoder_hidden_states": text["encoder_hidden_states"],
            "encoder_attention_mask": text["mask"],
        }

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return super().denoise(noisy, timesteps / 1000, conditioning)
