"""Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lit_lora.families.base import EncodingSteps, ModelFamily, encoded
from lit_lora.families.batch import Batch, Conditioning, target_size
from lit_lora.families.clip import clip_outputs
from lit_lora.families.native_layers import UNET_NAMING, NativeLayer, unet_layers
from lit_lora.families.stable_diffusion import UNET_ALWAYS_DENSE

_PUBLISHED = {
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
}
"""Entries of the published UNets' configs."""


class StableDiffusionXL(ModelFamily):
    """Base models of Stable Diffusion XL (Podell et al., 2023).

    The VAE overflows in half precision, so it always runs in float32.

    Args:
        pretrained_model_name_or_path: Folder that diffusers' ``save_pretrained`` wrote, hub id, or .safetensors file with the
            whole model or its denoiser.
        revision: Branch, tag or commit on the hub; defaults to the hub's default branch.
        variant: Variant of the weight files, such as ``fp16``; defaults to the files without a variant, or else to the only
            variant that a part has.
        vae: VAE to use instead of the pipeline's, of the same kind: a folder or hub id, of the VAE or of a pipeline, or a
            .safetensors file; defaults to the pipeline's own.
        config: For a model in one file, folder or hub id of a pipeline with the configs, the tokenizers and the parts that the
            file does not have; defaults to the repository on the hub that diffusers takes for its kind.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionXLPipeline
    denoiser_class: ClassVar[type[nn.Module]] = UNet2DConditionModel
    denoiser_name: ClassVar[str] = "unet"
    encoder_classes: ClassVar[dict[str, type[Any]]] = {
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": CLIPTokenizer,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    single_file_types: ClassVar[frozenset[str]] = frozenset({"xl_base"})
    block_classes: ClassVar[tuple[str, ...]] = ("BasicTransformerBlock", "ResnetBlock2D")
    default_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    token_encoders: ClassVar[Mapping[str, str]] = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    adaptable_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    always_dense: ClassVar[tuple[str, ...]] = (*UNET_ALWAYS_DENSE, "add_embedding.*")
    default_vae_dtype: ClassVar[torch.dtype | None] = torch.float32
    naming: ClassVar[tuple[str, ...]] = UNET_NAMING
    kohya_encoders: ClassVar[Mapping[str, str]] = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    undistilled: ClassVar[str] = "stabilityai/stable-diffusion-xl-base-1.0"
    # By default diffusers adds watermarks if the package for them is installed; samples of a training run need none.

    @property
    def further_inputs(self) -> str | None:
        config = self.denoiser_config
        added = config.get("addition_embed_type")
        if added != "text_time":
            return f"not conditioned on image sizes (addition_embed_type {added!r}, not 'text_time')"
        # The refiner's one encoder gives hidden states and pooled embedding; five numbers come with them, the base has six.
        numbers = config["projection_class_embeddings_input_dim"] - config["cross_attention_dim"]
        if self.source.index().get("requires_aesthetics_score") or numbers == 5 * config["addition_time_embed_dim"]:
            return "a refiner, which is conditioned on an aesthetic score and has one text encoder"
        return None

    @property
    def pipeline_options(self) -> dict[str, Any]:
        return {"add_watermarker": False}

    @classmethod
    def native_layers(cls, config: Mapping[str, Any]) -> Iterator[NativeLayer]:
        yield from unet_layers(_PUBLISHED | dict(config))

    @classmethod
    def model_spec(cls, config: Mapping[str, Any]) -> dict[str, str]:
        return {
            "modelspec.architecture": "stable-diffusion-xl-v1-base",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_network_module": "networks.lora",
            "ss_v2": "False",
        }

    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """Hidden states of both encoders' last layer but one, joined by channel, and the pooled output of the second encoder."""
        return encoded(self.encoding_steps(captions))

    def encoding_steps(self, captions: list[str]) -> EncodingSteps:
        hidden_states = []
        for suffix in ("", "_2"):
            yield f"text_encoder{suffix}"
            hidden, pooled = clip_outputs(self, suffix, captions)
            hidden_states.append(hidden)
        return {"encoder_hidden_states": torch.cat(hidden_states, dim=-1), "pooled": pooled}

    def unread_layers(self, name: str, part: Any) -> list[nn.Module]:
        """The last layer of the first encoder, whose output only the second encoder's pooled output would need."""
        return [getattr(part, "text_model", part).encoder.layers[-1]] if name == "text_encoder" else []

    def conditioning(self, text: Mapping[str, Tensor], batch: Batch, latents: Tensor) -> Conditioning:
        hidden = text["encoder_hidden_states"]
        added = {"text_embeds": text["pooled"], "time_ids": self._time_ids(batch).to(hidden)}
        return {"encoder_hidden_states": hidden, "added_cond_kwargs": added}

    @staticmethod
    def _time_ids(batch: Batch) -> Tensor:
        """SDXL's micro-conditioning: original size, top left corner of the crop and target size, ``(B, 6)``."""
        target = target_size(batch)
        original = batch.get("original_size", target)
        corner = batch.get("crop_top_left", torch.zeros_like(target))
        return torch.cat([original, corner, target], dim=1)
