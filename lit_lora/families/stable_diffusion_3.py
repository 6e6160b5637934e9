"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from lit_lora.argument_types import check_types
from lit_lora.errors import check_whole
from lit_lora.families.base import EncodingSteps, ModelFamily, encoded
from lit_lora.families.batch import Batch, Conditioning
from lit_lora.families.clip import clip_outputs
from lit_lora.families.native_layers import NativeLayer, single_layers
from lit_lora.objectives import FlowMatching, Objective

_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "attn.to_add_out": "context_block.attn.proj",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
}
"""Names in diffusers and in Stability AI's code."""


class StableDiffusion3(ModelFamily):
    """Stable Diffusion 3 and 3.5, medium and large (Esser et al., 2024, arXiv 2403.03206).

    The T5 encoder, more than half of the weights, may be left out: the denoiser was also trained with zeros in place of its
    embeddings.

    Args:
        pretrained_model_name_or_path: Folder that diffusers' ``save_pretrained`` wrote, hub id, or .safetensors file with the
            whole model or its denoiser.
        t5: Whether to use the T5 encoder, if the pipeline has it; defaults to True.
        max_sequence_length: Number of tokens of a caption for T5; defaults to 256, as in the pipeline.
        **options: Further options of :class:`ModelFamily`.

    Raises:
        UserError: If ``max_sequence_length`` is below 1.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusion3Pipeline
    denoiser_class: ClassVar[type[nn.Module]] = SD3Transformer2DModel
    denoiser_name: ClassVar[str] = "transformer"
    encoder_classes: ClassVar[dict[str, type[Any]]] = {
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": CLIPTokenizer,
        "tokenizer_3": T5TokenizerFast,
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    }
    optional_encoders: ClassVar[frozenset[str]] = frozenset({"tokenizer_3", "text_encoder_3"})
    single_file_types: ClassVar[frozenset[str]] = frozenset({"sd3", "sd35_medium", "sd35_large"})
    block_classes: ClassVar[tuple[str, ...]] = ("JointTransformerBlock",)
    default_targets: ClassVar[tuple[str, ...]] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    adaptable_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    default_objective: ClassVar[type[Objective]] = FlowMatching
    naming: ClassVar[tuple[str, ...]] = ("num_layers", "dual_attention_layers")
    kohya_encoders: ClassVar[Mapping[str, str]] = {
        "text_encoder": "lora_te1",
        "text_encoder_2": "lora_te2",
        "text_encoder_3": "lora_te3",
    }
    undistilled: ClassVar[str] = "stabilityai/stable-diffusion-3.5-large"
    always_dense: ClassVar[tuple[str, ...]] = (
        "pos_embed.*",
        "time_text_embed.*",
        "context_embedder",
        "norm_out.*",
        "proj_out",
    )

    def __init__(
        self,
        pretrained_model_name_or_path: str,
        t5: bool = True,
        max_sequence_length: int = 256,
        **options: Any,
    ) -> None:
        check_types(StableDiffusion3, locals())
        super().__init__(pretrained_model_name_or_path, **options)
        check_whole(1, max_sequence_length=max_sequence_length)
        self.t5 = t5
        self.max_sequence_length = max_sequence_length

    @property
    def size_multiple(self) -> int:
        return self.vae_scale_factor * int(self.denoiser_config["patch_size"])

    @property
    def text_settings(self) -> dict[str, Any]:
        return {"t5": self.t5, "max_sequence_length": self.max_sequence_length}

    def skips(self, encoder: str) -> bool:
        return super().skips(encoder) or (not self.t5 and encoder in self.optional_encoders)

    @classmethod
    def native_layers(cls, config: Mapping[str, Any]) -> Iterator[NativeLayer]:
        for i in range(int(config.get("num_layers", 38))):
            part, native = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
            yield from single_layers(_BLOCK, part, native)
            # The last block's text has two modulations, like the final layer's image.
            context = f"{native}context_block.adaLN_modulation.1"
            yield NativeLayer(context, (f"{part}norm1_context.linear",), swapped=True)
            for name, pattern in (
                ("x_block.attn", "attn.to_{}"),
                ("x_block.attn2", "attn2.to_{}"),
                ("context_block.attn", "attn.add_{}_proj"),
            ):
                yield NativeLayer(f"{native}{name}.qkv", tuple(part + pattern.format(letter) for letter in "qkv"))
        yield from single_layers(_ENDS)
        yield NativeLayer("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True)

    @classmethod
    def model_spec(cls, config: Mapping[str, Any]) -> dict[str, str]:
        version = "medium"
        if int(config.get("num_layers", 24)) == 38:
            version = "5-large"
        elif config.get("dual_attention_layers"):
            version = "5-medium"
        return {
            "modelspec.architecture": f"stable-diffusion-3-{version}",
            "modelspec.implementation": "diffusers",
            "ss_base_model_version": version,
            "ss_network_module": "networks.lora_sd3",
        }

    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """Hidden states of both CLIP encoders, joined by channel, then of T5, joined by token; pooled outputs of CLIP.

        CLIP's hidden states are those of the last layer but one.
        """
        return encoded(self.encoding_steps(captions))

    def encoding_steps(self, captions: list[str]) -> EncodingSteps:
        outputs = []
        for suffix in ("", "_2"):
            yield f"text_encoder{suffix}"
            outputs.append(clip_outputs(self, suffix, captions))
        if "text_encoder_3" in self.encoders:
            yield "text_encoder_3"
        hidden, pooled = zip(*outputs, strict=True)
        clip, t5 = torch.cat(hidden, dim=-1), self._t5_embeddings(captions)
        clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {"encoder_hidden_states": torch.cat([clip, t5.to(clip)], dim=1), "pooled": torch.cat(pooled, dim=-1)}

    def conditioning(self, text: Mapping[str, Tensor], batch: Batch, latents: Tensor) -> Conditioning:
        return {"encoder_hidden_states": text["encoder_hidden_states"], "pooled_projections": text["pooled"]}

    def prompt_inputs(self, prompts: list[str], guidance_scale: float) -> dict[str, Any]:
        """The prompts, or without T5 their embeddings, since diffusers 0.42's pipeline cannot encode prompts without T5."""
        if "text_encoder_3" in self.encoders:
            return {"prompt": prompts, "max_sequence_length": self.max_sequence_length}
        text = self.encode_captions(prompts)
        inputs = {"prompt_embeds": text["encoder_hidden_states"], "pooled_prompt_embeds": text["pooled"]}
        if self.sampling_passes(guidance_scale) > 1:
            empty = self.encode_captions([""] * len(prompts))
            inputs |= {"negative_prompt_embeds": empty["encoder_hidden_states"]}
            inputs |= {"negative_pooled_prompt_embeds": empty["pooled"]}
        return inputs

    def _t5_embeddings(self, captions: list[str]) -> Tensor:
        """T5's hidden states, ``(B, max_sequence_length, joint_attention_dim)``; as in the pipeline, padding is not masked."""
        if "text_encoder_3" not in self.encoders:
            width = int(self.denoiser_config["joint_attention_dim"])
            return torch.zeros(len(captions), self.max_sequence_length, width, device=self.device)
        ids = self.tokenize(self.encoders["tokenizer_3"], captions, self.max_sequence_length)
        embeddings: Tensor = self.encoders["text_encoder_3"](ids)[0]
        return embeddings
