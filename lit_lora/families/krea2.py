"""Krea 2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, Krea2Pipeline, Krea2Transformer2DModel
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen3VLModel

from lit_lora.argument_types import check_types
from lit_lora.errors import check_whole
from lit_lora.families.batch import Batch, Conditioning
from lit_lora.families.cut_captions import tell_cut_captions
from lit_lora.families.masks import unpadded
from lit_lora.families.native_layers import NativeLayer, single_layers
from lit_lora.families.qwen_vae import AFTER_PROMPT, BEFORE_PROMPT, DROPPED_TOKENS, QwenVAEFamily
from lit_lora.families.without_parts import without_parts
from lit_lora.objectives import FlowMatching, Objective
from lit_lora.to_device import to_device

_SUFFIX_TOKENS = 5
"""Number of tokens of ``AFTER_PROMPT``."""
_LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
"""Hidden states of Qwen3-VL that the denoiser gets, unless the pipeline's config says otherwise; 0 is the embedding."""

_BLOCK = {
    "attn.to_q": "attn.wq",
    "attn.to_k": "attn.wk",
    "attn.to_v": "attn.wv",
    "attn.to_gate": "attn.gate",
    "attn.to_out.0": "attn.wo",
    "ff.gate": "mlp.gate",
    "ff.up": "mlp.up",
    "ff.down": "mlp.down",
}
_ENDS = {
    "img_in": "first",
    "time_embed.linear_1": "tmlp.0",
    "time_embed.linear_2": "tmlp.2",
    "time_mod_proj": "tproj.1",
    "txt_in.linear_1": "txtmlp.1",
    "txt_in.linear_2": "txtmlp.3",
    "text_fusion.projector": "txtfusion.projector",
    "final_layer.linear": "last.linear",
}
"""Names in diffusers and in Krea's code."""


class Krea2(QwenVAEFamily):
    """Krea 2 (Krea, 2026), with Qwen-Image's VAE. Train on Raw; Turbo is distilled to eight steps and takes the same adapters.

    Each 2 x 2 patch of the latents is one token of the denoiser. Text is the hidden states of several layers of Qwen3-VL, which
    the denoiser fuses itself. All captions are padded to one length before the end of the prompt template, and padding is masked.

    Args:
        pretrained_model_name_or_path: Folder that diffusers' ``save_pretrained`` wrote, or hub id.
        max_sequence_length: Number of tokens of a caption with the end of its template; defaults to 512, as in the pipeline.
        **options: Further options of :class:`ModelFamily`.

    Raises:
        UserError: If ``max_sequence_length`` is below 6.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = Krea2Pipeline
    denoiser_class: ClassVar[type[nn.Module]] = Krea2Transformer2DModel
    denoiser_name: ClassVar[str] = "transformer"
    encoder_classes: ClassVar[dict[str, type[Any]]] = {
        "tokenizer": AutoTokenizer,
        "text_encoder": without_parts(Qwen3VLModel, "visual"),
    }
    block_classes: ClassVar[tuple[str, ...]] = ("Krea2TransformerBlock", "Krea2TextFusionBlock")
    default_targets: ClassVar[tuple[str, ...]] = tuple(_BLOCK)
    default_objective: ClassVar[type[Objective]] = FlowMatching
    text_masks: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "mask"}
    naming: ClassVar[tuple[str, ...]] = ("num_layers", "num_layerwise_text_blocks", "num_refiner_text_blocks")
    undistilled: ClassVar[str] = "krea/Krea-2-Raw"
    always_dense: ClassVar[tuple[str, ...]] = (
        *("img_in", "time_embed.*", "time_mod_proj"),
        *("txt_in.*", "text_fusion.projector", "final_layer.*"),
    )

    def __init__(
        self,
        pretrained_model_name_or_path: str,
        max_sequence_length: int = 512,
        **options: Any,
    ) -> None:
        check_types(Krea2, locals())
        super().__init__(pretrained_model_name_or_path, **options)
        check_whole(_SUFFIX_TOKENS + 1, max_sequence_length=max_sequence_length)
        self.max_sequence_length = max_sequence_length

    @property
    def default_size(self) -> int:
        return 1024

    @property
    def is_distilled(self) -> bool:
        """Whether the model is distilled to few steps: the pipeline's config says so for Turbo."""
        return bool(self._index.get("is_distilled")) or super().is_distilled

    @property
    def text_settings(self) -> dict[str, Any]:
        return {"layers": self._layers, "max_sequence_length": self.max_sequence_length}

    @property
    def pipeline_options(self) -> dict[str, Any]:
        return {"text_encoder_select_layers": self._layers, "is_distilled": bool(self._index.get("is_distilled"))}

    @classmethod
    def native_layers(cls, config: Mapping[str, Any]) -> Iterator[NativeLayer]:
        for name, part, native, default in (
            ("num_layers", "transformer_blocks", "blocks", 28),
            ("num_layerwise_text_blocks", "text_fusion.layerwise_blocks", "txtfusion.layerwise_blocks", 2),
            ("num_refiner_text_blocks", "text_fusion.refiner_blocks", "txtfusion.refiner_blocks", 2),
        ):
            for i in range(int(config.get(name, default))):
                yield from single_layers(_BLOCK, f"{part}.{i}.", f"{native}.{i}.")
        yield from single_layers(_ENDS)

    @classmethod
    def model_spec(cls, config: Mapping[str, Any]) -> dict[str, str]:
        return {
            "modelspec.architecture": "Krea-2",
            "modelspec.implementation": "https://github.com/krea-ai/krea-2",
            "ss_base_model_version": "krea2",
            "ss_network_module": "networks.lora_krea2",
        }

    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """Hidden states of Qwen3-VL's layers, ``(B, max_sequence_length, layers, D)``, and the mask of tokens; zeros for padding.

        The pipeline has padding between the caption and the end of the template; here it comes last. To the denoiser all text
        tokens have the same position.
        """
        tokenizer = self.encoders["tokenizer"]
        texts = [BEFORE_PROMPT + caption for caption in captions]
        encoded = tokenizer(
            texts,
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.max_sequence_length + DROPPED_TOKENS - _SUFFIX_TOKENS,
            return_tensors="pt",
        )
        tell_cut_captions(tokenizer, texts, encoded.attention_mask, captions)
        suffix = tokenizer([AFTER_PROMPT] * len(captions), return_tensors="pt")
        ids = to_device(torch.cat([encoded.input_ids, suffix.input_ids], dim=1), self.device)
        mask = to_device(torch.cat([encoded.attention_mask, suffix.attention_mask], dim=1).bool(), self.device)
        positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)  # padding takes none
        states = self.encoders["text_encoder"](
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions.expand(3, -1, -1),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        hidden = torch.stack([states[layer] for layer in self._layers], dim=2)[:, DROPPED_TOKENS:]
        order = mask[:, DROPPED_TOKENS:].int().argsort(dim=1, descending=True, stable=True)
        mask = mask[:, DROPPED_TOKENS:].gather(1, order)
        hidden = hidden.gather(1, order[..., None, None].expand_as(hidden))
        return {"encoder_hidden_states": hidden.masked_fill(~mask[..., None, None], 0), "mask": mask}

    def conditioning(self, text: Mapping[str, Tensor], batch: Batch, latents: Tensor) -> Conditioning:
        hidden, mask = unpadded(text["encoder_hidden_states"], text["mask"])
        rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
        return {
            "encoder_hidden_states": hidden,
            "encoder_attention_mask": mask,
            "position_ids": Krea2Pipeline.prepare_position_ids(hidden.shape[1], rows, columns, latents.device),
        }

    def prompt_inputs(self, prompts: list[str], guidance_scale: float) -> dict[str, Any]:
        """Prompts and the pipeline's ``guidance_scale``, which is 0 without guidance: ``p + scale * (p - n)``, for ``p`` with the
        prompt and ``n`` without.
        """
        scale = max(guidance_scale - 1, 0.0)
        return {"prompt": prompts, "max_sequence_length": self.max_sequence_length, "guidance_scale": scale}

    @cached_property
    def _index(self) -> Mapping[str, Any]:
        """Settings in the pipeline's ``model_index.json``."""
        return self.source.index()

    @property
    def _layers(self) -> tuple[int, ...]:
        return tuple(self._index.get("text_encoder_select_layers") or _LAYERS)
