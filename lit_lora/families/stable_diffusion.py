"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from lit_lora.families.base import ModelFamily
from lit_lora.families.batch import Batch, Conditioning
from lit_lora.families.native_layers import UNET_NAMING, NativeLayer, unet_layers

_PUBLISHED = {
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "transformer_layers_per_block": 1,
}
"""Entries of the published UNets' configs."""

UNET_ALWAYS_DENSE = ("conv_in", "conv_out", "time_embedding.*", "*.time_emb_proj")
"""Layers at both ends of a UNet and those of the timestep embedding: 3 % of Stable Diffusion 1.5's weights."""


class StableDiffusion(ModelFamily):
    """Stable Diffusion 1.x and 2.x, and other models with the same pipeline (Rombach et al., 2022).

    Args:
        pretrained_model_name_or_path: Folder that diffusers' ``save_pretrained`` wrote, hub id, .safetensors file with the whole
            model or its denoiser, or ``embedded`` for the small model that ships with the package.
        revision: Branch, tag or commit on the hub; defaults to the hub's default branch.
        variant: Variant of the weight files, such as ``fp16``; defaults to the files without a variant, or else to the only
            variant that a part has.
        vae: VAE to use instead of the pipeline's, of the same kind: a folder or hub id, of the VAE or of a pipeline, or a
            .safetensors file; defaults to the pipeline's own.
        config: For a model in one file, folder or hub id of a pipeline with the configs, the tokenizers and the parts that the
            file does not have; defaults to the repository on the hub that diffusers takes for its kind.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionPipeline
    denoiser_class: ClassVar[type[nn.Module]] = UNet2DConditionModel
    denoiser_name: ClassVar[str] = "unet"
    encoder_classes: ClassVar[dict[str, type[Any]]] = {"tokenizer": CLIPTokenizer, "text_encoder": CLIPTextModel}
    single_file_types: ClassVar[frozenset[str]] = frozenset({"v1", "v2"})
    block_classes: ClassVar[tuple[str, ...]] = ("BasicTransformerBlock", "ResnetBlock2D")
    default_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    token_encoders: ClassVar[Mapping[str, str]] = {"text_encoder": ""}
    adaptable_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    always_dense: ClassVar[tuple[str, ...]] = UNET_ALWAYS_DENSE
    naming: ClassVar[tuple[str, ...]] = (*UNET_NAMING, "cross_attention_dim")
    kohya_encoders: ClassVar[Mapping[str, str]] = {"text_encoder": "lora_te"}
    undistilled: ClassVar[str] = "stable-diffusion-v1-5/stable-diffusion-v1-5"

    @property
    def further_inputs(self) -> str | None:
        config = self.denoiser_config
        if config.get("class_embed_type") or config.get("num_class_embeds"):
            return "conditioned on classes, noise levels or an image beside the text, as upscalers and unCLIP are"
        if config.get("addition_embed_type"):
            return f"conditioned on more than the text (addition_embed_type {config['addition_embed_type']!r})"
        if str(config.get("attention_type", "default")).startswith("gated"):
            return "conditioned on boxes beside the text, as GLIGEN is"
        return None

    @property
    def pipeline_options(self) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    @classmethod
    def native_layers(cls, config: Mapping[str, Any]) -> Iterator[NativeLayer]:
        yield from unet_layers(_PUBLISHED | dict(config))

    @classmethod
    def kohya_layers(cls, config: Mapping[str, Any]) -> Iterator[NativeLayer]:
        """Diffusers' names: kohya's scripts train Stable Diffusion 1.x and 2.x in diffusers' code."""
        for layer in cls.native_layers(config):
            yield NativeLayer(layer.parts[0], layer.parts)

    @classmethod
    def model_spec(cls, config: Mapping[str, Any]) -> dict[str, str]:
        second = config.get("cross_attention_dim") == 1024
        return {
            "modelspec.architecture": "stable-diffusion-v2-512" if second else "stable-diffusion-v1",
            "modelspec.implementation": "diffusers",
            "ss_base_model_version": "sd_v2" if second else "sd_v1",
            "ss_network_module": "networks.lora",
            "ss_v2": str(second),
        }

    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        ids = self.tokenize(self.encoders["tokenizer"], captions)
        return {"encoder_hidden_states": self.encoders["text_encoder"](ids)[0]}

    def conditioning(self, text: Mapping[str, Tensor], batch: Batch, latents: Tensor) -> Conditioning:
        return dict(text)
