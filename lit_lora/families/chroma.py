"""Chroma."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, DiffusionPipeline
from torch import Tensor, nn
from transformers import T5EncoderModel, T5TokenizerFast

from lit_lora.argument_types import check_types
from lit_lora.errors import check_most, check_whole
from lit_lora.families.batch import Batch, Conditioning
from lit_lora.families.native_layers import NativeLayer, single_layers
from lit_lora.families.packed import PackedFamily
from lit_lora.families.packing import positions
from lit_lora.families.parts import base_model
from lit_lora.objectives import FlowMatching, Objective

_MOST_TOKENS = 512

_DOUBLE_BLOCK = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_APPROXIMATOR = {"linear_1": "in_layer", "linear_2": "out_layer"}
_ENDS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
    "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
    "proj_out": "final_layer.linear",
}
"""Names in diffusers and in Chroma's code (github.com/lodestone-rock/flow)."""


class Chroma(PackedFamily):
    """Chroma (Lodestone Rock, 2025), made of FLUX.1-schnell without its distillation.

    T5 is the only text encoder, and guidance is classifier-free. Of a caption's padding the first token alone takes part in
    attention, as in the model's own training code. ChromaPipeline of diffusers 0.42 adds that mask to the attention scores
    instead, so that all padding takes part (github.com/huggingface/diffusers/issues/12116); :meth:`prompt_inputs` therefore
    gives it the embeddings with a boolean mask, which it passes on as it is.

    Args:
        pretrained_model_name_or_path: Folder that diffusers' ``save_pretrained`` wrote, or hub id.
        max_sequence_length: Number of tokens of a caption, at most 512; defaults to 512, as in the pipeline.
        **options: Further options of :class:`ModelFamily`.

    Raises:
        UserError: If ``max_sequence_length`` is outside its range.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = ChromaPipeline
    denoiser_class: ClassVar[type[nn.Module]] = ChromaTransformer2DModel
    denoiser_name: ClassVar[str] = "transformer"
    encoder_classes: ClassVar[dict[str, type[Any]]] = {"tokenizer": T5TokenizerFast, "text_encoder": T5EncoderModel}
    block_classes: ClassVar[tuple[str, ...]] = ("ChromaTransformerBlock", "ChromaSingleTransformerBlock")
    default_targets: ClassVar[tuple[str, ...]] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    default_objective: ClassVar[type[Objective]] = FlowMatching
    text_masks: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "mask"}
    naming: ClassVar[tuple[str, ...]] = ("num_layers", "num_single_layers", "approximator_layers")
    kohya_encoders: ClassVar[Mapping[str, str]] = {"text_encoder": "lora_te3"}
    undistilled: ClassVar[str] = "lodestones/Chroma1-HD"
    always_dense: ClassVar[tuple[str, ...]] = (
        "x_embedder",
        "context_embedder",
        "distilled_guidance_layer.*",
        "proj_out",
    )

    def __init__(
        self,
        pretrained_model_name_or_path: str,
        max_sequence_length: int = _MOST_TOKENS,
        **options: Any,
    ) -> None:
        check_types(Chroma, locals())
        super().__init__(pretrained_model_name_or_path, **options)
        check_whole(1, max_sequence_length=max_sequence_length)
        check_most(_MOST_TOKENS, max_sequence_length=max_sequence_length)
        self.max_sequence_length = max_sequence_length

    @property
    def is_distilled(self) -> bool:
        """Whether the model is distilled to few steps: Chroma1-Flash is."""
        return bool(re.search("flash", Path(self.source.path).name, re.IGNORECASE)) or super().is_distilled

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
            yield NativeLayer(f"{native}linear2", (f"{part}proj_out",))
            fused = (*(f"{part}attn.to_{letter}" for letter in "qkv"), f"{part}proj_mlp")
            yield NativeLayer(f"{native}linear1", fused, sizes=(1, 1, 1, 4))
        for i in range(int(config.get("approximator_layers", 5))):
            layer = f"distilled_guidance_layer.layers.{i}."
            yield from single_layers(_APPROXIMATOR, layer, layer)
        yield from single_layers(_ENDS)

    @classmethod
    def model_spec(cls, config: Mapping[str, Any]) -> dict[str, str]:
        return {
            "modelspec.architecture": "chroma",
            "modelspec.implementation": "https://huggingface.co/lodestones/Chroma",
            "ss_base_model_version": "chroma",
            "ss_network_module": "networks.lora_flux",
        }

    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """T5's last hidden states, computed without padding, and the mask with the first token of the padding in addition."""
        ids, tokens = self.masked_tokens(self.encoders["tokenizer"], captions, self.max_sequence_length)
        hidden = self.encoders["text_encoder"](ids, attention_mask=tokens)[0]
        mask = torch.arange(tokens.shape[1], device=tokens.device) <= tokens.sum(1, keepdim=True)
        return {"encoder_hidden_states": hidden, "mask": mask}

    def conditioning(self, text: Mapping[str, Tensor], batch: Batch, latents: Tensor) -> Conditioning:
        hidden, mask = text["encoder_hidden_states"], text["mask"]
        image = mask.new_ones(len(latents), self.num_tokens(latents.shape))
        return {
            "encoder_hidden_states": hidden,
            "attention_mask": torch.cat([mask, image], dim=1),
            "txt_ids": torch.zeros(hidden.shape[1], 3, device=latents.device),
            "img_ids": positions(latents.shape[-2] // 2, latents.shape[-1] // 2, latents.device),
        }

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        with self._mask_in_checkpointed_blocks(conditioning["attention_mask"]):
            return super().denoise(noisy, timesteps, conditioning)

    def prompt_inputs(self, prompts: list[str], guidance_scale: float) -> dict[str, Any]:
        """Embeddings with boolean masks, which the pipeline does not make of prompts itself."""
        inputs = {}
        for prefix, captions in (("", prompts), ("negative_", [""] * len(prompts))):
            if not prefix or self.sampling_passes(guidance_scale) > 1:
                text = self.encode_captions(captions)
                inputs[f"{prefix}prompt_embeds"] = text["encoder_hidden_states"]
                inputs[f"{prefix}prompt_attention_mask"] = text["mask"]
        return inputs

    @contextmanager
    def _mask_in_checkpointed_blocks(self, mask: Tensor) -> Iterator[None]:
        """A context in which single blocks get the mask under gradient checkpointing too, where diffusers 0.42 leaves it out."""
        model = base_model(self.denoiser)
        checkpoint = getattr(model, "_gradient_checkpointing_func", None)
        if checkpoint is None:
            yield
            return

        def call(block: Any, *args: Any) -> Any:
            # Single blocks get hidden states, time and positions; double blocks get more.
            return checkpoint(block, *args, mask) if len(args) == 3 else checkpoint(block, *args)

        model._gradient_checkpointing_func = call
        try:
            yield
        finally:
            model._gradient_checkpointing_func = checkpoint
