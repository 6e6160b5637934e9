"""Sana."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderDC, DiffusionPipeline, SanaPipeline, SanaTransformer2DModel
from torch import Tensor, nn
from transformers import Gemma2Model, GemmaTokenizerFast

from lit_lora.argument_types import check_types
from lit_lora.errors import check_whole
from lit_lora.families.base import ModelFamily
from lit_lora.families.batch import Batch, Conditioning
from lit_lora.objectives import FlowMatching, Objective
from lit_lora.to_device import to_device

_INSTRUCTION: list[str] = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
"""Lines that tell Gemma, before the caption, what to make of it."""


class Sana(ModelFamily):
    """Sana (Xie et al., 2024, arXiv 2410.10629).

    The autoencoder reduces the edge of an image by 32 and has no randomness. Gemma 2 reads captions, in lower case, after an
    instruction, whose tokens the transformer does not get. Empty captions are read without it, as the pipeline reads the
    empty negative prompt, so that dropped captions train what guidance subtracts.

    Args:
        pretrained_model_name_or_path: Folder that diffusers' ``save_pretrained`` wrote, or hub id.
        complex_human_instruction: Whether captions follow the pipeline's instruction; defaults to True.
        max_sequence_length: Number of tokens of a caption; defaults to 300, as in the pipeline.
        **options: Further options of :class:`ModelFamily`.

    Raises:
        UserError: If ``max_sequence_length`` is below 2.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = SanaPipeline
    denoiser_class: ClassVar[type[nn.Module]] = SanaTransformer2DModel
    denoiser_name: ClassVar[str] = "transformer"
    vae_class: ClassVar[type[nn.Module]] = AutoencoderDC
    encoder_classes: ClassVar[dict[str, type[Any]]] = {"tokenizer": GemmaTokenizerFast, "text_encoder": Gemma2Model}
    block_classes: ClassVar[tuple[str, ...]] = ("SanaTransformerBlock",)
    default_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("ff.conv_inverted", "ff.conv_point"),
    )
    default_objective: ClassVar[type[Objective]] = FlowMatching
    default_vae_dtype: ClassVar[torch.dtype | None] = torch.float32  # as in diffusers' script for LoRA
    text_masks: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "mask"}
    undistilled: ClassVar[str] = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
    always_dense: ClassVar[tuple[str, ...]] = ("patch_embed.*", "time_embed.*", "caption_projection.*", "proj_out")

    def __init__(
        self,
        pretrained_model_name_or_path: str,
        complex_human_instruction: bool = True,
        max_sequence_length: int = 300,
        **options: Any,
    ) -> None:
        check_types(Sana, locals())
        super().__init__(pretrained_model_name_or_path, **options)
        check_whole(2, max_sequence_length=max_sequence_length)
        self.complex_human_instruction = complex_human_instruction
        self.max_sequence_length = max_sequence_length

    @property
    def vae_scale_factor(self) -> int:
        return int(2 ** (len(self.vae_config["encoder_block_out_channels"]) - 1))

    @property
    def text_settings(self) -> dict[str, Any]:
        return {
            "complex_human_instruction": self.complex_human_instruction,
            "max_sequence_length": self.max_sequence_length,
        }

    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """Gemma's last hidden states of the first token and of the caption, and the mask of these tokens."""
        instruction = "\n".join(_INSTRUCTION) if self.complex_human_instruction else ""
        hidden, mask = self._read(captions, instruction)
        if instruction and "" in captions:
            plain, plain_mask = self._read([""] * len(captions), "")
            empty = to_device(torch.tensor([not caption for caption in captions]), mask.device)
            hidden = torch.where(empty[:, None, None], plain, hidden)
            mask = torch.where(empty[:, None], plain_mask, mask)
        return {"encoder_hidden_states": hidden, "mask": mask}

    def conditioning(self, text: Mapping[str, Tensor], batch: Batch, latents: Tensor) -> Conditioning:
        return {
            "encoder_hidden_states": text["encoder_hidden_states"],
            "encoder_attention_mask": text["mask"],
        }

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return super().denoise(noisy, timesteps * self.denoiser_config["timestep_scale"], conditioning)

    def prompt_inputs(self, prompts: list[str], guidance_scale: float) -> dict[str, Any]:
        """The prompts as they are trained, and the size as it is asked for instead of the nearest of the pipeline's list."""
        return {
            "prompt": prompts,
            "max_sequence_length": self.max_sequence_length,
            "complex_human_instruction": _INSTRUCTION if self.complex_human_instruction else None,
            "clean_caption": False,
            "use_resolution_binning": False,
        }

    def _read(self, captions: list[str], instruction: str) -> tuple[Tensor, Tensor]:
        """Gemma's hidden states and the mask of ``max_sequence_length`` tokens: the first and the last of all.

        Args:
            captions: ``B`` captions.
            instruction: Beginning of what Gemma reads; "" for none.
        """
        tokenizer, length = self.encoders["tokenizer"], self.max_sequence_length
        tokenizer.padding_side = "right"
        texts = [instruction + caption.lower().strip() for caption in captions]
        # The pipeline's count: of the instruction's tokens the first and the last are among those of the caption.
        total = len(tokenizer.encode(instruction)) + length - 2 if instruction else length
        ids, mask = self.masked_tokens(tokenizer, texts, total, captions)
        hidden = self.encoders["text_encoder"](ids, attention_mask=mask)[0]
        hidden, mask = (
            torch.cat([values[:, :1], values[:, total - length + 1 : total]], dim=1) for values in (hidden, mask)
        )
        return hidden, mask
