"""FLUX.2."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLFlux2,
    DiffusionPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from torch import Tensor, nn
from transformers import Mistral3ForConditionalGeneration, PixtralProcessor, Qwen2Tokenizer, Qwen3ForCausalLM

from lit_lora.argument_types import check_types
from lit_lora.errors import check_least, check_most, check_whole
from lit_lora.families.batch import Batch, Conditioning
from lit_lora.families.cut_captions import tell_cut_captions
from lit_lora.families.native_layers import NativeLayer, single_layers
from lit_lora.families.packed import PackedFamily
from lit_lora.families.packing import positions
from lit_lora.families.without_parts import without_parts
from lit_lora.objectives import FlowMatching, Objective
from lit_lora.to_device import to_device

_MOST_TOKENS = 512
_MISTRAL_LAYERS = (10, 20, 30)
_QWEN_LAYERS = (9, 18, 27)
"""Hidden states that the denoiser gets; 0 is the embedding."""
_KLEIN_ENCODERS: dict[str, type[Any]] = {
    "tokenizer": Qwen2Tokenizer,
    "text_encoder": without_parts(Qwen3ForCausalLM, "lm_head"),
}

_DOUBLE_BLOCK = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_SINGLE_BLOCK = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}
_ENDS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
}
"""Names in diffusers and in Black Forest Labs' code."""
_MODELS = {(8, 48): "dev", (8, 24): "klein-9b", (5, 20): "klein-4b"}
"""Names of the published models by their numbers of double and single blocks."""


class Flux2(PackedFamily):
    """FLUX.2 dev and klein (Black Forest Labs, 2025 and 2026).

    Each 2 x 2 patch of the latents is one token of the denoiser. The statistics of a batch norm, which the VAE has for the
    values of a patch, take the place of shift and scale. Text is the hidden states of three layers side by side: of Mistral
    Small 3, after a system message, for dev; of Qwen3 for klein. All captions have one length, and padding is not masked.

    dev is distilled from classifier-free guidance and takes the guidance scale as an input, for which training has an option of
    its own. klein has no such input. Its models without ``base`` in their names are distilled to four steps.

    Args:
        pretrained_model_name_or_path: Folder that diffusers' ``save_pretrained`` wrote, hub id, or .safetensors file with the
            denoiser.
        train_guidance_scale: Guidance scale that dev gets as input in training, at least 0; defaults to 3.5, as in diffusers'
            script.
        max_sequence_length: Number of tokens of a caption with its chat template, at most 512; defaults to 512, as in the
            pipelines.
        **options: Further options of :class:`ModelFamily`. ``config`` has to be given for klein in one file, because diffusers
            takes every such file for dev.

    Raises:
        UserError: If a value is outside its range.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = Flux2Pipeline
    other_pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]] = (Flux2KleinPipeline,)
    image_pipelines: ClassVar[tuple[str, ...]] = ("Flux2KleinKVPipeline",)
    denoiser_class: ClassVar[type[nn.Module]] = Flux2Transformer2DModel
    denoiser_name: ClassVar[str] = "transformer"
    vae_class: ClassVar[type[nn.Module]] = AutoencoderKLFlux2
    encoder_classes: ClassVar[dict[str, type[Any]]] = {
        "tokenizer": PixtralProcessor,
        "text_encoder": without_parts(
            Mistral3ForConditionalGeneration, "model.vision_tower", "model.multi_modal_projector", "lm_head"
        ),
    }
    single_file_types: ClassVar[frozenset[str]] = frozenset({"flux-2-dev"})
    block_classes: ClassVar[tuple[str, ...]] = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    default_targets: ClassVar[tuple[str, ...]] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        *("attn.to_qkv_mlp_proj", "attn.to_out"),
    )
    default_objective: ClassVar[type[Objective]] = FlowMatching
    naming: ClassVar[tuple[str, ...]] = ("num_layers", "num_single_layers")
    undistilled: ClassVar[str] = "the base of its size, black-forest-labs/FLUX.2-klein-base-4B or -9B"
    always_dense: ClassVar[tuple[str, ...]] = (
        *("x_embedder", "context_embedder", "time_guidance_embed.*"),
        *("double_stream_modulation_img.*", "double_stream_modulation_txt.*", "single_stream_modulation.*"),
        *("norm_out.*", "proj_out"),
    )

    def __init__(
        self,
        pretrained_model_name_or_path: str,
        train_guidance_scale: float = 3.5,
        max_sequence_length: int = _MOST_TOKENS,
        **options: Any,
    ) -> None:
        check_types(Flux2, locals())
        super().__init__(pretrained_model_name_or_path, **options)
        check_least(0, train_guidance_scale=train_guidance_scale)
        check_whole(1, max_sequence_length=max_sequence_length)
        check_most(_MOST_TOKENS, max_sequence_length=max_sequence_length)
        self.train_guidance_scale = train_guidance_scale
        self.max_sequence_length = max_sequence_length

    @property
    def base_encoders(self) -> dict[str, type[Any]]:
        return _KLEIN_ENCODERS if self._is_klein else self.encoder_classes

    @property
    def is_distilled(self) -> bool:
        """Whether the model is distilled to few steps: klein is, as the pipeline's config says, but its base models are not."""
        named = re.search(r"klein-\d+b", Path(self.source.path).name, re.IGNORECASE)
        return self._ignores_guidance or named is not None or super().is_distilled

    @property
    def text_settings(self) -> dict[str, Any]:
        return {"max_sequence_length": self.max_sequence_length}

    @classmethod
    def native_layers(cls, config: Mapping[str, Any]) -> Iterator[NativeLayer]:
        for i in range(int(config.get("num_layers", 8))):
            part, native = f"transformer_blocks.{i}.", f"double_blocks.{i}."
            yield from single_layers(_DOUBLE_BLOCK, part, native)
            for kind, pattern in (("img", "to_{}"), ("txt", "add_{}_proj")):
                parts = tuple(f"{part}attn.{pattern.format(letter)}" for letter in "qkv")
                yield NativeLayer(f"{native}{kind}_attn.qkv", parts)
        for i in range(int(config.get("num_single_layers", 48))):
            yield from single_layers(_SINGLE_BLOCK, f"single_transformer_blocks.{i}.", f"single_blocks.{i}.")
        yield from single_layers(_ENDS)
        yield NativeLayer("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True)

    @classmethod
    def model_spec(cls, config: Mapping[str, Any]) -> dict[str, str]:
        blocks = (int(config.get("num_layers", 8)), int(config.get("num_single_layers", 48)))
        model = _MODELS.get(blocks, "dev")
        return {
            "modelspec.architecture": f"Flux.2-{model}",
            "modelspec.implementation": "https://github.com/black-forest-labs/flux2",
            "ss_base_model_version": f"flux_2_{model.replace('-', '_')}",
            "ss_network_module": "networks.lora_flux_2",
        }

    def posterior(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, normalized already, in the VAE's dtype, ``(B, *latent_shape)`` each.

        The statistics are weights of the VAE, which training over a cache does not load.

        Args:
            pixel_values: Images, uint8 in [0, 255] or float in [-1, 1], ``(B, 3, H, W)``.
        """
        mean, std = super().posterior(pixel_values)
        center, spread = self._patch_statistics(mean)
        return ((mean.float() - center) / spread).to(mean.dtype), (std.float() / spread).to(std.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        center, spread = self._patch_statistics(latents)
        return super().decode(latents * spread + center)

    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """Hidden states of three layers of the text encoder, ``(B, max_sequence_length, 3 D)``, padding included."""
        ids, mask = self._qwen_tokens(captions) if self._is_klein else self._mistral_tokens(captions)
        # Without the head, whose logits for all words of the vocabulary are large.
        encoder = self.encoders["text_encoder"].model
        states = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        layers = _QWEN_LAYERS if self._is_klein else _MISTRAL_LAYERS
        return {"encoder_hidden_states": torch.cat([states[layer] for layer in layers], dim=-1)}

    def conditioning(self, text: Mapping[str, Tensor], batch: Batch, latents: Tensor) -> Conditioning:
        """Positions have four entries: image, row, column and text token."""
        hidden = text["encoder_hidden_states"]
        guidance = None
        if self.denoiser_config["guidance_embeds"]:
            guidance = torch.full((len(latents),), self.train_guidance_scale, device=latents.device)
        places = positions(latents.shape[-2] // 2, latents.shape[-1] // 2, latents.device)
        return {
            "encoder_hidden_states": hidden,
            "txt_ids": F.pad(torch.arange(hidden.shape[1], device=latents.device).unsqueeze(1), (3, 0)),
            "img_ids": F.pad(places, (0, 1)),
            "guidance": guidance,
        }

    def sampling_passes(self, guidance_scale: float) -> int:
        """One pass for dev, which takes the guidance scale as an input, and for distilled models."""
        return super().sampling_passes(guidance_scale) if self._is_klein and not self._ignores_guidance else 1

    def prompt_inputs(self, prompts: list[str], guidance_scale: float) -> dict[str, Any]:
        """The prompts; klein's pipeline takes the empty negative prompt by itself."""
        inputs = {"prompt": prompts, "max_sequence_length": self.max_sequence_length}
        return inputs | ({"guidance_scale": 1.0} if self._ignores_guidance else {})

    @property
    def _is_klein(self) -> bool:
        return issubclass(self.base_pipeline, Flux2KleinPipeline)

    @property
    def _ignores_guidance(self) -> bool:
        """Whether the pipeline draws without guidance, because its config says that the model is distilled."""
        return bool(self.base_options.get("is_distilled"))

    def _mistral_tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask of captions after the system message, int64 ``(B, max_sequence_length)`` each."""
        processor = self.encoders["tokenizer"]
        texts = processor.apply_chat_template(format_input(captions))
        encoded = processor.tokenizer(
            texts,
            add_special_tokens=False,  # the template has them
            padding="max_length",
            truncation=True,
            max_length=self.max_sequence_length,
            return_tensors="pt",
        )
        tell_cut_captions(processor.tokenizer, texts, encoded.attention_mask, captions, add_special_tokens=False)
        return to_device(encoded.input_ids, self.device), to_device(encoded.attention_mask, self.device)

    def _qwen_tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask of captions as a user's messages, int64 ``(B, max_sequence_length)`` each."""
        tokenizer = self.encoders["tokenizer"]
        messages = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": caption}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            for caption in captions
        ]
        return self.masked_tokens(tokenizer, messages, self.max_sequence_length, captions)

    def _patch_statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's batch norm for each place in a patch, float32 ``(*latent_shape)`` each."""
        norm = self.vae.bn
        rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
        spread = (norm.running_var.float() + self.vae_config["batch_norm_eps"]).sqrt()
        center, spread = (
            values.view(-1, 2, 2).repeat(1, rows, columns) for values in (norm.running_mean.float(), spread)
        )
        return center, spread
