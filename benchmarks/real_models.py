"""Folders of pipelines with real architecture and size and random weights, on whose values memory and time do not depend.

The configs follow those published with Stable Diffusion 1.5, XL 1.0, 3.5 medium and large, FLUX.1, Chroma1-HD, PixArt-Sigma XL,
Sana 1.6B, both at 1024 px, Z-Image, Qwen-Image and FLUX.2 dev, klein 4B and klein 9B; they were written from memory.
``python benchmarks/real_models.py sd15 FOLDER`` writes one pipeline.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    PixArtTransformer2DModel,
    PNDMScheduler,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from lit_lora.embedded import base_path
from lit_lora.files import atomic_folder

_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
_CLIP_G = _CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "hidden_act": "gelu",
}
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}

_SD15: dict[str, Callable[[], Any]] = {
    "unet": lambda: UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
    ),
    "vae": lambda: AutoencoderKL(**_VAE, sample_size=512, scaling_factor=0.18215),
    "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**_CLIP_L)),
    "scheduler": lambda: PNDMScheduler(**_BETAS, skip_prk_steps=True),
}
_SDXL: dict[str, Callable[[], Any]] = {
    "unet": lambda: UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "vae": lambda: AutoencoderKL(**_VAE, sample_size=1024, scaling_factor=0.13025),
    "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**_CLIP_L, projection_dim=768)),
    "text_encoder_2": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**_CLIP_G, projection_dim=1280)),
    "scheduler": lambda: EulerDiscreteScheduler(**_BETAS, use_karras_sigmas=False),
}
_VAE_16 = _VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024}
_FLUX_VAE = _VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159}
_T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "use_cache": False,
}


def _sd3(layers: int, heads: int, pos_embed_max_size: int, dual: tuple[int, ...] = ()) -> dict[str, Callable[[], Any]]:
    """The parts of a Stable Diffusion 3.5 pipeline; ``dual`` holds the indices of its layers with dual attention."""
    return {
        "transformer": lambda: SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            num_layers=layers,
            attention_head_dim=64,
            num_attention_heads=heads,
            joint_attention_dim=4096,
            caption_projection_dim=64 * heads,
            pooled_projection_dim=2048,
            out_channels=16,
            pos_embed_max_size=pos_embed_max_size,
            dual_attention_layers=dual,
            qk_norm="rms_norm",
        ),
        "vae": lambda: AutoencoderKL(**_VAE_16, scaling_factor=1.5305, shift_factor=0.0609),
        "text_encoder": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**_CLIP_L, projection_dim=768)),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**_CLIP_G, projection_dim=1280)),
        "text_encoder_3": lambda: T5EncoderModel(T5Config(**_T5_XXL)),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def _flux(guidance: bool, t5: dict[str, Any] = _T5_XXL, **layers: int) -> dict[str, Callable[[], Any]]:
    return {
        "transformer": lambda: FluxTransformer2DModel(guidance_embeds=guidance, **layers),
        "vae": lambda: AutoencoderKL(**_FLUX_VAE),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**_CLIP_L, projection_dim=768)),
        "text_encoder_2": lambda: T5EncoderModel(T5Config(**t5)),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance
        ),
    }


_CHROMA: dict[str, Callable[[], Any]] = {
    "transformer": lambda: ChromaTransformer2DModel(),
    "vae": lambda: AutoencoderKL(**_FLUX_VAE),
    "text_encoder": lambda: T5EncoderModel(T5Config(**_T5_XXL)),
    "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=1.0),
}
_PIXART_SIGMA: dict[str, Callable[[], Any]] = {
    "transformer": lambda: PixArtTransformer2DModel(
        sample_size=128, caption_channels=4096, interpolation_scale=2, use_additional_conditions=False
    ),
    "vae": lambda: AutoencoderKL(**_VAE, sample_size=1024, scaling_factor=0.13025),
    "text_encoder": lambda: T5EncoderModel(T5Config(**_T5_XXL)),
    "scheduler": lambda: DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
}
_SANA: dict[str, Callable[[], Any]] = {
    "transformer": lambda: SanaTransformer2DModel(),
    "vae": lambda: AutoencoderDC(
        encoder_block_types=(*("ResBlock",) * 3, *("EfficientViTBlock",) * 3),
        decoder_block_types=(*("ResBlock",) * 3, *("EfficientViTBlock",) * 3),
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        scaling_factor=0.41407,
    ),
    "text_encoder": lambda: Gemma2Model(Gemma2Config()),
    "scheduler": lambda: DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
}

_QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
_Z_IMAGE: dict[str, Callable[[], Any]] = {
    "transformer": lambda: ZImageTransformer2DModel(axes_lens=[1536, 512, 512]),
    "vae": lambda: AutoencoderKL(**_FLUX_VAE),
    "text_encoder": lambda: Qwen3Model(Qwen3Config(**_QWEN3_4B)),
    "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=6.0),
}

_QWEN_2_5_VL_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
}
_QWEN_IMAGE: dict[str, Callable[[], Any]] = {
    "transformer": QwenImageTransformer2DModel,
    "vae": AutoencoderKLQwenImage,
    "text_encoder": lambda: Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=_QWEN_2_5_VL_7B, vision_config={"hidden_size": 1280, "out_hidden_size": 3584})
    ),
    "scheduler": lambda: FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    ),
}
_QWEN_3_VL_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0, "mrope_section": [24, 20, 20]},
}
_KREA2: dict[str, Callable[[], Any]] = {
    "transformer": Krea2Transformer2DModel,
    "vae": AutoencoderKLQwenImage,
    "text_encoder": lambda: Qwen3VLModel(
        Qwen3VLConfig(
            text_config=_QWEN_3_VL_4B,
            vision_config={"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "out_hidden_size": 2560},
        )
    ),
    "scheduler": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
}

_QWEN3_8B = _QWEN3_4B | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}


def _flux2(encoder: Callable[[], Any], **transformer: Any) -> dict[str, Callable[[], Any]]:
    return {
        "transformer": lambda: Flux2Transformer2DModel(**transformer),
        "vae": AutoencoderKLFlux2,
        "text_encoder": encoder,
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }


def _klein(encoder: dict[str, Any], **transformer: Any) -> dict[str, Callable[[], Any]]:
    return _flux2(
        lambda: Qwen3ForCausalLM(Qwen3Config(**encoder)),
        joint_attention_dim=3 * encoder["hidden_size"],
        guidance_embeds=False,
        **transformer,
    )


PIPELINES = {
    "sd15": _SD15,
    "sdxl": _SDXL,
    "sd35_medium": _sd3(24, 24, 384, tuple(range(13))),
    "sd35_large": _sd3(38, 38, 192),
    "flux_dev": _flux(guidance=True),
    "flux_schnell": _flux(guidance=False),
    # As wide as FLUX.1 dev, with few layers, for machines in which that has no room.
    "flux_cut": _flux(guidance=True, t5=_T5_XXL | {"num_layers": 1}, num_layers=2, num_single_layers=4),
    "flux_kontext": _flux(guidance=True),
    "chroma": _CHROMA,
    "pixart_sigma": _PIXART_SIGMA,
    "sana": _SANA,
    "z_image": _Z_IMAGE,
    "qwen_image": _QWEN_IMAGE,
    "krea2": _KREA2,
    "flux2_dev": _flux2(lambda: Mistral3ForConditionalGeneration(Mistral3Config(tie_word_embeddings=False))),
    "flux2_klein_9b": _klein(_QWEN3_8B, num_single_layers=24, num_attention_heads=32),
    "flux2_klein_4b": _klein(_QWEN3_4B, num_layers=5, num_single_layers=20, num_attention_heads=24),
}
_OTHER_PIPELINES = {
    "flux_kontext": "FluxKontextPipeline",
    "flux2_klein_9b": "Flux2KleinPipeline",
    "flux2_klein_4b": "Flux2KleinPipeline",
}
"""Classes of pipelines that are not the first of their family."""
_MARKER = "random_weights.txt"


def write_pipeline(
    name: str, folder: str | Path, weights: bool = True, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Path:
    """Write a complete pipeline folder, unless an earlier call has written it.

    Args:
        name: One of :data:`PIPELINES`.
        folder: Folder to write: 4.3 GB for ``sd15``, 14 GB for ``sdxl``, more for the others.
        weights: Whether to write weights; without them the configs and tokenizers take kilobytes. Defaults to True.
        device: Device that draws the weights; a GPU is much faster. Defaults to "cpu".
        dtype: dtype of the weights. Defaults to float32.

    Returns:
        The folder.
    """
    folder = Path(folder)
    if (folder / _MARKER).exists() and (not weights or any((folder / "vae").glob("*.safetensors"))):
        return folder
    parts = PIPELINES[name]
    with atomic_folder(folder, marker=_MARKER) as part:
        for subfolder, make in parts.items():
            if weights:
                with torch.device(device):
                    model = make()
                if subfolder != "scheduler":
                    model.to(dtype)
                model.save_pretrained(
                    part / subfolder, **({} if subfolder == "scheduler" else {"max_shard_size": "50GB"})
                )
                del model
                continue
            with torch.device("cpu" if subfolder == "scheduler" else "meta"):
                model = make()
            config = model.config if subfolder.startswith("text") else model
            (config.save_pretrained if subfolder.startswith("text") else config.save_config)(part / subfolder)
        for subfolder, make in parts.items():
            if subfolder.startswith("text_encoder"):
                with torch.device("meta"):
                    encoder = make()
                _tokenizer(encoder).save_pretrained(part / subfolder.replace("text_encoder", "tokenizer"))
        if name in _OTHER_PIPELINES:
            (part / "model_index.json").write_text(json.dumps({"_class_name": _OTHER_PIPELINES[name]}))
        (part / _MARKER).write_text(f"{name} with random weights, for measuring\n", encoding="utf-8")
    return folder


def _tokenizer(encoder: PreTrainedModel) -> Any:
    """A tokenizer of the encoder's kind with hardly any words, which makes as many tokens."""
    if isinstance(encoder, T5EncoderModel):
        return T5TokenizerFast(vocab=[(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>", "\u2581")], extra_ids=0)
    if isinstance(encoder, Gemma2Model):
        return GemmaTokenizer()
    if isinstance(encoder, Qwen2_5_VLForConditionalGeneration | Qwen3VLModel):
        return Qwen2Tokenizer(vocab={byte: number for number, byte in enumerate(ByteLevel.alphabet())}, merges=[])
    if isinstance(encoder, Qwen3Model | Qwen3ForCausalLM):
        return Qwen2Tokenizer(chat_template="{{ messages[0].content }}")
    if isinstance(encoder, Mistral3ForConditionalGeneration):
        words = {"<unk>": 0, "<pad>": 1, "[IMG]": 2, "[IMG_BREAK]": 3, "[IMG_END]": 4}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), unk_token="<unk>", pad_token="<pad>"
        )
        return PixtralProcessor(PixtralImageProcessor(), tokenizer, chat_template="{{ messages[1].content[0].text }}")
    return CLIPTokenizer.from_pretrained(base_path(), subfolder="tokenizer", model_max_length=77)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=PIPELINES)
    parser.add_argument("folder")
    options = parser.parse_args()
    print(write_pipeline(options.name, options.folder))
