"""PixArt-Sigma."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import Tensor, nn
from transformers import T5EncoderModel, T5TokenizerFast

from lit_lora.argument_types import check_types
from lit_lora.errors import check_whole
from lit_lora.families.base import ModelFamily
from lit_lora.families.batch import Batch, Conditioning, target_size
from lit_lora.families.native_layers import NativeLayer, single_layers

_BLOCK = {
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_FUSED = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}
_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "adaln_single.emb.resolution_embedder.linear_1": "csize_embedder.mlp.0",
    "adaln_single.emb.resolution_embedder.linear_2": "csize_embedder.mlp.2",
    "adaln_single.emb.aspect_ratio_embedder.linear_1": "ar_embedder.mlp.0",
    "adaln_single.emb.aspect_ratio_embedder.linear_2": "ar_embedder.mlp.2",
    "adaln_single.linear": "t_block.1",
    "proj_out": "final_layer.linear",
}
"""Names in diffusers and in PixArt's code."""


class PixArtSigma(ModelFamily):
    """PixArt-Sigma (Chen et al., 2024, arXiv 2403.04692).

    The transformer predicts noise and variance, of which the noise is trained, as in PixArt's script for LoRA. Captions are
    in lower case, as in the pipeline.

    Args:
        pretrained_model_name_or_path: Folder that diffusers' ``save_pretrained`` wrote, or hub id.
        max_sequence_length: Number of tokens of a caption; defaults to 300, as in the pipeline.
        **options: Further options of :class:`ModelFamily`.

    Raises:
        UserError: If ``max_sequence_length`` is below 1.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = PixArtSigmaPipeline
    denoiser_class: ClassVar[type[nn.Module]] = PixArtTransformer2DModel
    older_denoisers: ClassVar[tuple[str, ...]] = ("Transformer2DModel",)
    denoiser_name: ClassVar[str] = "transformer"
    encoder_classes: ClassVar[dict[str, type[Any]]] = {"tokenizer": T5TokenizerFast, "text_encoder": T5EncoderModel}
    block_classes: ClassVar[tuple[str, ...]] = ("BasicTransformerBlock",)
    default_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    default_vae_dtype: ClassVar[torch.dtype | None] = torch.float32  # the VAE of SDXL, which overflows in float16
    text_masks: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "mask"}
    naming: ClassVar[tuple[str, ...]] = ("num_layers",)
    undistilled: ClassVar[str] = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
    always_dense: ClassVar[tuple[str, ...]] = ("pos_embed.*", "adaln_single.*", "caption_projection.*", "proj_out")

    def __init__(
        self,
        pretrained_model_name_or_path: str,
        max_sequence_length: int = 300,
        **options: Any,
    ) -> None:
        check_types(PixArtSigma, locals())
        super().__init__(pretrained_model_name_or_path, **options)
        check_whole(1, max_sequence_length=max_sequence_length)
        self.max_sequence_length = max_sequence_length

    @property
    def size_multiple(self) -> int:
        return self.vae_scale_factor * int(self.denoiser_config["patch_size"])

    @property
    def text_settings(self) -> dict[str, Any]:
        return {"max_sequence_length": self.max_sequence_length}

    @property
    def _takes_sizes(self) -> bool:
        """Whether the transformer takes resolution and aspect ratio, by diffusers' rule where the config leaves it open."""
        told = self.denoiser_config.get("use_additional_conditions")
        return self.denoiser_config["sample_size"] == 128 if told is None else bool(told)

    @classmethod
    def native_layers(cls, config: Mapping[str, Any]) -> Iterator[NativeLayer]:
        for i in range(int(config.get("num_layers", 28))):
            part, native = f"transformer_blocks.{i}.", f"blocks.{i}."
            yield from single_layers(_BLOCK, part, native)
            for name, parts in _FUSED.items():
                yield NativeLayer(native + name, tuple(part + one for one in parts))
        yield from single_layers(_ENDS)

    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """T5's last hidden states, computed without padding, and the mask of the tokens."""
        captions = [caption.lower().strip() for caption in captions]
        ids, mask = self.masked_tokens(self.encoders["tokenizer"], captions, self.max_sequence_length)
        return {"encoder_hidden_states": self.encoders["text_encoder"](ids, attention_mask=mask)[0], "mask": mask}

    def conditioning(self, text: Mapping[str, Tensor], batch: Batch, latents: Tensor) -> Conditioning:
        hidden = text["encoder_hidden_states"]
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self._takes_sizes:
            size = target_size(batch).to(latents.device)
            sizes["resolution"] = size.to(hidden.dtype)
            sizes["aspect_ratio"] = (size[:, :1] / size[:, 1:]).to(hidden.dtype)
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": text["mask"], "added_cond_kwargs": sizes}

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The predicted noise, ``(B, *latent_shape)``, without the learned variance."""
        return super().denoise(noisy, timesteps, conditioning)[:, : noisy.shape[1]]

    def pipeline(self, scheduler_config: Mapping[str, Any] | None = None) -> DiffusionPipeline:
        """As in the base class; for transformers that take sizes PixArt-Alpha's, since Sigma's does not give them."""
        pipeline = super().pipeline(scheduler_config)
        if self._takes_sizes:
            pipeline = PixArtAlphaPipeline(**pipeline.components)
            pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def prompt_inputs(self, prompts: list[str], guidance_scale: float) -> dict[str, Any]:
        """The prompts as they are trained, and the size as it is asked for instead of the nearest of the pipeline's list."""
        return {
            "prompt": prompts,
            "max_sequence_length": self.max_sequence_length,
            "clean_caption": False,
            "use_resolution_binning": False,
        }
