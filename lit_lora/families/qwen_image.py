"""Qwen-Image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from diffusers import DiffusionPipeline, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from lit_lora.argument_types import check_types
from lit_lora.errors import check_most, check_whole
from lit_lora.families.batch import Batch, Conditioning
from lit_lora.families.cut_captions import tell_cut_captions
from lit_lora.families.masks import unpadded
from lit_lora.families.native_layers import NativeLayer, single_layers
from lit_lora.families.qwen_vae import AFTER_PROMPT, BEFORE_PROMPT, DROPPED_TOKENS, QwenVAEFamily
from lit_lora.families.without_parts import without_parts
from lit_lora.objectives import FlowMatching, Objective
from lit_lora.to_device import to_device

_MOST_TOKENS = 1024

_BLOCK = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
)
_MODULATION = ("img_mod.1", "txt_mod.1")
_ENDS = (
    *("img_in", "txt_in", "norm_out.linear", "proj_out"),
    *("time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2"),
)
"""Names in diffusers, which the weights were published with."""


class QwenImage(QwenVAEFamily):
    """Qwen-Image for text to image (Wu et al., 2025, arXiv 2508.02324).

    Each 2 x 2 patch of the latents is one token of the denoiser. Text is the last hidden states of Qwen2.5-VL for the caption in
    a prompt template, whose first tokens are dropped. A batch of captions is padded to the longest, and padding is masked.

    Args:
        pretrained_model_name_or_path: Folder that diffusers' ``save_pretrained`` wrote, or hub id.
        max_sequence_length: Largest number of tokens of a caption with the end of its template, at most 1024; defaults to 512,
            as in the pipeline.
        **options: Further options of :class:`ModelFamily`.

    Raises:
        UserError: If ``max_sequence_length`` is outside its range.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = QwenImagePipeline
    image_pipelines: ClassVar[tuple[str, ...]] = (
        *("QwenImageEditPipeline", "QwenImageEditInpaintPipeline", "QwenImageEditPlusPipeline"),
        "QwenImageLayeredPipeline",
    )
    denoiser_class: ClassVar[type[nn.Module]] = QwenImageTransformer2DModel
    denoiser_name: ClassVar[str] = "transformer"
    encoder_classes: ClassVar[dict[str, type[Any]]] = {
        "tokenizer": Qwen2Tokenizer,
        "text_encoder": without_parts(Qwen2_5_VLForConditionalGeneration, "model.visual", "lm_head"),
    }
    block_classes: ClassVar[tuple[str, ...]] = ("QwenImageTransformerBlock",)
    default_targets: ClassVar[tuple[str, ...]] = _BLOCK
    default_objective: ClassVar[type[Objective]] = FlowMatching
    text_masks: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "mask"}
    naming: ClassVar[tuple[str, ...]] = ("num_layers",)
    undistilled: ClassVar[str] = "Qwen/Qwen-Image"
    always_dense: ClassVar[tuple[str, ...]] = ("img_in", "txt_in", "time_text_embed.*", "norm_out.*", "proj_out")

    def __init__(
        self,
        pretrained_model_name_or_path: str,
        max_sequence_length: int = 512,
        **options: Any,
    ) -> None:
        check_types(QwenImage, locals())
        super().__init__(pretrained_model_name_or_path, **options)
        check_whole(1, max_sequence_length=max_sequence_length)
        check_most(_MOST_TOKENS, max_sequence_length=max_sequence_length)
        self.max_sequence_length = max_sequence_length

    @property
    def further_inputs(self) -> str | None:
        config = self.denoiser_config
        if config.get("use_additional_t_cond") or config.get("use_layer3d_rope"):
            return "for the layers of an image, Qwen-Image-Layered, and takes that image beside the noise"
        # The first Qwen-Image-Edit has the same configs; its pipeline alone has a processor of images.
        source = self.source.settings
        edits = source.is_local and not source.index() and not source.lacks("processor")
        if config.get("zero_cond_t") or edits:
            return "for editing, Qwen-Image-Edit, and takes a reference image beside the noise"
        return None

    @property
    def text_settings(self) -> dict[str, Any]:
        return {"max_sequence_length": self.max_sequence_length}

    @classmethod
    def native_layers(cls, config: Mapping[str, Any]) -> Iterator[NativeLayer]:
        blocks = [f"transformer_blocks.{i}." for i in range(int(config.get("num_layers", 60)))]
        names = [*_ENDS, *(block + name for block in blocks for name in (*_BLOCK, *_MODULATION))]
        yield from single_layers({name: name for name in names})

    @classmethod
    def model_spec(cls, config: Mapping[str, Any]) -> dict[str, str]:
        return {
            "modelspec.architecture": "Qwen-Image",
            "modelspec.implementation": "https://github.com/QwenLM/Qwen-Image",
            "ss_base_model_version": "qwen_image",
            "ss_network_module": "networks.lora_qwen_image",
        }

    def unread_layers(self, name: str, part: Any) -> list[nn.Module]:
        """Those of the last block that only change the text's hidden states, which end there."""
        block = part.transformer_blocks[-1]
        return [block.attn.add_q_proj, block.attn.to_add_out, block.txt_mlp]

    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """Qwen2.5-VL's last hidden states, ``(B, max_sequence_length, D)``, and the mask of tokens; zeros for padding."""
        longest = self.max_sequence_length
        texts = [f"{BEFORE_PROMPT}{caption}{AFTER_PROMPT}" for caption in captions]
        encoded = self.encoders["tokenizer"](
            texts,
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=_MOST_TOKENS + DROPPED_TOKENS,
            return_tensors="pt",
        )
        if encoded.attention_mask.shape[1] >= longest + DROPPED_TOKENS:
            read = encoded.attention_mask[:, : longest + DROPPED_TOKENS]
            tell_cut_captions(self.encoders["tokenizer"], texts, read, captions)
        # Without the head, whose logits for all words of the vocabulary are large.
        encoder = self.encoders["text_encoder"].model
        ids, whole_mask = to_device(encoded.input_ids, self.device), to_device(encoded.attention_mask, self.device)
        hidden = encoder(ids, attention_mask=whole_mask, use_cache=False).last_hidden_state
        mask = whole_mask[:, DROPPED_TOKENS:][:, :longest].bool()
        hidden = hidden[:, DROPPED_TOKENS:][:, :longest].masked_fill(~mask.unsqueeze(-1), 0)
        missing = longest - mask.shape[1]
        return {"encoder_hidden_states": F.pad(hidden, (0, 0, 0, missing)), "mask": F.pad(mask, (0, missing))}

    def conditioning(self, text: Mapping[str, Tensor], batch: Batch, latents: Tensor) -> Conditioning:
        hidden, mask = unpadded(text["encoder_hidden_states"], text["mask"])
        return {
            "encoder_hidden_states": hidden,
            "encoder_hidden_states_mask": mask,
            "img_shapes": [[(1, latents.shape[-2] // 2, latents.shape[-1] // 2)]] * len(latents),
        }

    def prompt_inputs(self, prompts: list[str], guidance_scale: float) -> dict[str, Any]:
        """Prompts and ``true_cfg_scale``: ``guidance_scale`` is the input of models that guidance was distilled into."""
        inputs = {"prompt": prompts, "max_sequence_length": self.max_sequence_length}
        if self.sampling_passes(guidance_scale) > 1:
            inputs |= {"negative_prompt": [""] * len(prompts)}
        return inputs | {"guidance_scale": None, "true_cfg_scale": guidance_scale}
