"""Z-Image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Model

from lit_lora.argument_types import check_types
from lit_lora.errors import check_whole
from lit_lora.families.base import ModelFamily
from lit_lora.families.batch import Batch, Conditioning
from lit_lora.families.masks import token_counts
from lit_lora.families.native_layers import NativeLayer, single_layers
from lit_lora.objectives import FlowMatching, Objective

_PATCH = 2
_TURBO_SHIFT = 3.0
"""Shift in the scheduler config of Z-Image-Turbo; Z-Image has 6."""

_BLOCK = (
    *(f"attention.to_{name}" for name in ("q", "k", "v", "out.0")),
    *(f"feed_forward.w{number}" for number in (1, 2, 3)),
)
_MODULATION = "adaLN_modulation.0"
_ENDS = (
    "all_x_embedder.2-1",
    "cap_embedder.1",
    "t_embedder.mlp.0",
    "t_embedder.mlp.2",
    "all_final_layer.2-1.linear",
    "all_final_layer.2-1.adaLN_modulation.1",
)


class ZImage(ModelFamily):
    """Z-Image (Tongyi, 2025, arXiv 2511.22699).

    One transformer over the tokens of image and caption together. It takes both as lists, a caption without its padding,
    measures time from noise (0) to data (1), and predicts the negative velocity. Z-Image-Turbo is distilled to eight steps.

    Its pipeline turns guidance off at the scale 0 and adds ``scale * (p - n)`` to the prediction ``p`` with the prompt, where
    ``n`` is the one without: a scale of 5 here is 4 there.

    Args:
        pretrained_model_name_or_path: Folder that diffusers' ``save_pretrained`` wrote, or hub id.
        max_sequence_length: Largest number of tokens of a caption with its chat template; defaults to 512, as in the pipeline.
        **options: Further options of :class:`ModelFamily`.

    Raises:
        UserError: If ``max_sequence_length`` is below 1.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = ZImagePipeline
    denoiser_class: ClassVar[type[nn.Module]] = ZImageTransformer2DModel
    denoiser_name: ClassVar[str] = "transformer"
    encoder_classes: ClassVar[dict[str, type[Any]]] = {"tokenizer": Qwen2Tokenizer, "text_encoder": Qwen3Model}
    block_classes: ClassVar[tuple[str, ...]] = ("ZImageTransformerBlock",)
    default_targets: ClassVar[tuple[str, ...]] = _BLOCK
    default_objective: ClassVar[type[Objective]] = FlowMatching
    text_masks: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "mask"}
    naming: ClassVar[tuple[str, ...]] = ("n_layers", "n_refiner_layers")
    undistilled: ClassVar[str] = "Tongyi-MAI/Z-Image"
    always_dense: ClassVar[tuple[str, ...]] = (
        "all_x_embedder.*",
        "cap_embedder.*",
        "t_embedder.*",
        "all_final_layer.*",
    )

    def __init__(
        self,
        pretrained_model_name_or_path: str,
        max_sequence_length: int = 512,
        **options: Any,
    ) -> None:
        check_types(ZImage, locals())
        super().__init__(pretrained_model_name_or_path, **options)
        check_whole(1, max_sequence_length=max_sequence_length)
        self.max_sequence_length = max_sequence_length

    @property
    def size_multiple(self) -> int:
        return _PATCH * self.vae_scale_factor

    @property
    def default_size(self) -> int:
        return 1024

    @property
    def further_inputs(self) -> str | None:
        takes_images = self.denoiser_config.get("siglip_feat_dim") is not None
        return "for generation from images too, Z-Image-Omni, and takes their SigLIP features" if takes_images else None

    @property
    def is_distilled(self) -> bool:
        """Whether the model is distilled to few steps: Z-Image-Turbo is, and its scheduler has another shift."""
        return self.scheduler_config.get("shift") == _TURBO_SHIFT or super().is_distilled

    @property
    def text_settings(self) -> dict[str, Any]:
        return {"max_sequence_length": self.max_sequence_length}

    def num_tokens(self, latent_shape: Sequence[int]) -> int:
        return latent_shape[-2] // _PATCH * (latent_shape[-1] // _PATCH)

    @classmethod
    def native_layers(cls, config: Mapping[str, Any]) -> Iterator[NativeLayer]:
        """All layers of the denoiser; Tongyi's code and diffusers give them the same names, which ComfyUI knows too."""
        blocks = [f"layers.{i}." for i in range(int(config.get("n_layers", 30)))]
        refiners = range(int(config.get("n_refiner_layers", 2)))
        names = [*_ENDS, *(f"context_refiner.{i}.{name}" for i in refiners for name in _BLOCK)]
        for block in (*blocks, *(f"noise_refiner.{i}." for i in refiners)):
            names += [block + name for name in (*_BLOCK, _MODULATION)]
        yield from single_layers({name: name for name in names})

    @classmethod
    def model_spec(cls, config: Mapping[str, Any]) -> dict[str, str]:
        return {
            "modelspec.architecture": "Z-Image",
            "modelspec.implementation": "https://github.com/Tongyi-MAI/Z-Image",
            "ss_base_model_version": "z_image",
            "ss_network_module": "networks.lora_zimage",
        }

    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """Qwen3's hidden states before its last layer, of each caption as a user's message; zeros for padding."""
        tokenizer = self.encoders["tokenizer"]
        messages = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for caption in captions
        ]
        ids, mask = self.masked_tokens(tokenizer, messages, self.max_sequence_length, captions)
        output = self.encoders["text_encoder"](
            input_ids=ids, attention_mask=mask.bool(), output_hidden_states=True, use_cache=False
        )
        return {"encoder_hidden_states": output.hidden_states[-2] * mask.unsqueeze(-1), "mask": mask}

    def conditioning(self, text: Mapping[str, Tensor], batch: Batch, latents: Tensor) -> Conditioning:
        hidden = text["encoder_hidden_states"]
        return {"cap_feats": [one[:count] for one, count in zip(hidden, token_counts(text["mask"]), strict=True)]}

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        images = list(noisy.unsqueeze(2))  # one frame each
        predictions = self.denoiser(images, (1000 - timesteps) / 1000, **conditioning).sample
        return -torch.stack(predictions).squeeze(2)

    def prompt_inputs(self, prompts: list[str], guidance_scale: float) -> dict[str, Any]:
        pipelines_scale = max(0.0, guidance_scale - 1)
        return {
            "prompt": prompts,
            "max_sequence_length": self.max_sequence_length,
            "guidance_scale": pipelines_scale,
        }
