"""FLUX.1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from lit_lora.argument_types import check_types
from lit_lora.errors import UserError, check_least, check_most, check_whole
from lit_lora.families.base import EncodingSteps, encoded
from lit_lora.families.batch import Batch, Conditioning
from lit_lora.families.native_layers import NativeLayer, single_layers
from lit_lora.families.packed import PackedFamily
from lit_lora.families.packing import positions
from lit_lora.objectives import FlowMatching, Objective

_MOST_TOKENS = 512

_DOUBLE_BLOCK = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE_BLOCK = {"norm.linear": "modulation.lin", "proj_out": "linear2"}
_ENDS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "proj_out": "final_layer.linear",
}
"""Names in diffusers and in Black Forest Labs' code."""


class Flux(PackedFamily):
    """FLUX.1 dev and schnell (Black Forest Labs, 2024).

    Each 2 x 2 patch of the latents is one token of the denoiser. FLUX.1-dev is distilled from classifier-free guidance and takes
    the guidance scale as an input, for which training has an option of its own.

    Args:
        pretrained_model_name_or_path: Folder that diffusers' ``save_pretrained`` wrote, hub id, or .safetensors file with the
            whole model or its denoiser.
        train_guidance_scale: Guidance scale that FLUX.1-dev gets as input in training, at least 0; defaults to 1.
        max_sequence_length: Number of tokens of a caption for T5, at most 512; defaults to 512, as in the pipeline.
        **options: Further options of :class:`ModelFamily`.

    Raises:
        UserError: If a value is outside its range; when its configs are read, if ``train_guidance_scale`` is given for a model
            that takes no guidance scale.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = FluxPipeline
    image_pipelines: ClassVar[tuple[str, ...]] = (
        *("FluxKontextInpaintPipeline", "FluxFillPipeline"),
        *("FluxControlPipeline", "FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline"),
    )
    denoiser_class: ClassVar[type[nn.Module]] = FluxTransformer2DModel
    denoiser_name: ClassVar[str] = "transformer"
    encoder_classes: ClassVar[dict[str, type[Any]]] = {
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": T5TokenizerFast,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": T5EncoderModel,
    }
    single_file_types: ClassVar[frozenset[str]] = frozenset({"flux-dev", "flux-schnell"})
    block_classes: ClassVar[tuple[str, ...]] = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    default_targets: ClassVar[tuple[str, ...]] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    adaptable_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    default_objective: ClassVar[type[Objective]] = FlowMatching
    naming: ClassVar[tuple[str, ...]] = ("num_layers", "num_single_layers", "guidance_embeds")
    kohya_encoders: ClassVar[Mapping[str, str]] = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te3"}
    undistilled: ClassVar[str] = "black-forest-labs/FLUX.1-dev"
    always_dense: ClassVar[tuple[str, ...]] = (
        "x_embedder",
        "context_embedder",
        "time_text_embed.*",
        "norm_out.*",
        "proj_out",
    )

    def __init__(
        self,
        pretrained_model_name_or_path: str,
        train_guidance_scale: float = 1.0,
        max_sequence_length: int = _MOST_TOKENS,
        **options: Any,
    ) -> None:
        check_types(Flux, locals())
        super().__init__(pretrained_model_name_or_path, **options)
        check_least(0, train_guidance_scale=train_guidance_scale)
        check_whole(1, max_sequence_length=max_sequence_length)
        check_most(_MOST_TOKENS, max_sequence_length=max_sequence_length)
        self.train_guidance_scale = train_guidance_scale
        self.max_sequence_length = max_sequence_length

    def read_configs(self) -> None:
        super().read_configs()
        if not self.denoiser_config.get("guidance_embeds", True) and self.train_guidance_scale != 1:
            raise UserError(
                f"train_guidance_scale={self.train_guidance_scale} has no effect, since {str(self.source)!r} takes no "
                f"guidance scale (guidance_embeds is false), as FLUX.1-schnell; leave it out"
            )

    @property
    def is_distilled(self) -> bool:
        """Whether the model is distilled to few steps: FLUX.1-schnell is, and has no guidance embedding."""
        return not self.denoiser_config["guidance_embeds"] or super().is_distilled

    @property
    def text_settings(self) -> dict[str, Any]:
        return {"max_sequence_length": self.max_sequence_length}

    @classmethod
    def native_layers(cls, config: Mapping[str, Any]) -> Iterator[NativeLayer]:
        for i in range(int(config.get("num_layers", 19))):
            part, native = f"transformer_blocks.{i}.", f"double_blocks.{i}."
            yield from single_layers(_DOUBLE_BLOCK, part, native)
            for kind, pattern in (("img", "to_{}"), ("txt", "add_{}_proj")):
                parts = tuple(f"{part}attn.{pattern.format(letter)}" for letter in "qkv")
                yield NativeLayer(f"{native}{kind}_attn.qkv", parts)
        for i in range(int(config.get("num_single_layers", 38))):
            part, native = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
            yield from single_layers(_SINGLE_BLOCK, part, native)
            fused = (*(f"{part}attn.to_{letter}" for letter in "qkv"), f"{part}proj_mlp")
            yield NativeLayer(f"{native}linear1", fused, sizes=(1, 1, 1, 4))
        yield from single_layers(_ENDS)
        yield NativeLayer("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True)

    @classmethod
    def model_spec(cls, config: Mapping[str, Any]) -> dict[str, str]:
        return {
            "modelspec.architecture": "flux-1-dev" if config.get("guidance_embeds", True) else "flux-1-schnell",
            "modelspec.implementation": "https://github.com/black-forest-labs/flux",
            "ss_base_model_version": "flux1",
            "ss_network_module": "networks.lora_flux",
        }

    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """CLIP's pooled output, and T5's last hidden states; as in the pipeline, padding is not masked."""
        return encoded(self.encoding_steps(captions))

    def encoding_steps(self, captions: list[str]) -> EncodingSteps:
        yield "text_encoder"
        clip_ids = self.tokenize(self.encoders["tokenizer"], captions)
        pooled = self.encoders["text_encoder"](clip_ids).pooler_output
        yield "text_encoder_2"
        t5_ids = self.tokenize(self.encoders["tokenizer_2"], captions, self.max_sequence_length)
        return {"encoder_hidden_states": self.encoders["text_encoder_2"](t5_ids)[0], "pooled": pooled}

    def conditioning(self, text: Mapping[str, Tensor], batch: Batch, latents: Tensor) -> Conditioning:
        hidden = text["encoder_hidden_states"]
        guidance = None
        if self.denoiser_config["guidance_embeds"]:
            guidance = torch.full((len(latents),), self.train_guidance_scale, device=latents.device)
        return {
            "encoder_hidden_states": hidden,
            "pooled_projections": text["pooled"],
            "txt_ids": torch.zeros(hidden.shape[1], 3, device=latents.device),
            "img_ids": positions(latents.shape[-2] // 2, latents.shape[-1] // 2, latents.device),
            "guidance": guidance,
        }

    def sampling_passes(self, guidance_scale: float) -> int:
        """One pass: the guidance scale is an input of the denoiser."""
        return 1

    def prompt_inputs(self, prompts: list[str], guidance_scale: float) -> dict[str, Any]:
        return {"prompt": prompts, "max_sequence_length": self.max_sequence_length}
