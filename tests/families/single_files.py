"""Tiny models as one file: the inverse of diffusers' conversion, from the names of the families' original layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_lora.families import ModelFamily

Tensors = dict[str, Tensor]

_DENOISER = "model.diffusion_model."
_FLUX_NORMS = {
    r"^transformer_blocks\.(\d+)\.attn\.norm_(q|k)\.weight": r"double_blocks.\1.img_attn.norm.\2.scale",
    r"^transformer_blocks\.(\d+)\.attn\.norm_added_(q|k)\.weight": r"double_blocks.\1.txt_attn.norm.\2.scale",
    r"^single_transformer_blocks\.(\d+)\.attn\.norm_(q|k)\.weight": r"single_blocks.\1.norm.\2.scale",
    r"norm\.q\.scale": "norm.query_norm.scale",
    r"norm\.k\.scale": "norm.key_norm.scale",
}
_SD3_NORMS = {
    r"^transformer_blocks\.(\d+)\.attn\.norm_(q|k)\.weight": r"joint_blocks.\1.x_block.attn.ln_\2.weight",
    r"^transformer_blocks\.(\d+)\.attn\.norm_added_(q|k)\.weight": r"joint_blocks.\1.context_block.attn.ln_\2.weight",
    r"pos_embed\.pos_embed": "pos_embed",
}
_VAE = {
    r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)": r"encoder.down.\1.block.\2",
    r"encoder\.down_blocks\.(\d+)\.downsamplers\.0": r"encoder.down.\1.downsample",
    r"decoder\.up_blocks\.0\.resnets\.(\d+)": r"decoder.up.1.block.\1",  # counted from the image on, of two blocks
    r"decoder\.up_blocks\.0\.upsamplers\.0": r"decoder.up.1.upsample",
    r"decoder\.up_blocks\.1\.resnets\.(\d+)": r"decoder.up.0.block.\1",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0\.group_norm": "mid.attn_1.norm",
    r"mid_block\.attentions\.0\.to_out\.0": "mid.attn_1.proj_out",
    r"mid_block\.attentions\.0\.to_": "mid.attn_1.",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
}
_OPEN_CLIP = {
    r"^(?:text_model\.)?encoder\.layers\.": "transformer.resblocks.",
    r"^(?:text_model\.)?final_layer_norm": "ln_final",
    "layer_norm": "ln_",
    r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj",
    r"self_attn\.out_proj": "attn.out_proj",
    r"^(?:text_model\.)?embeddings\.position_embedding\.weight": "positional_embedding",
    r"^(?:text_model\.)?embeddings\.token_embedding": "token_embedding",
}


def write_single_file(
    path: Path, kind: type[ModelFamily], folder: Path, whole: bool = True, prefix: str = _DENOISER
) -> Path:
    """A pipeline as one file.

    Args:
        path: File to write.
        kind: Family of the pipeline.
        folder: Folder of the pipeline.
        whole: Whether to write VAE and text encoders too; defaults to True.
        prefix: Beginning of the denoiser's names.
    """
    family = kind(str(folder))
    family.load(torch.float32)
    tensors = {prefix + name: value for name, value in original_denoiser(family).items()}
    if whole:
        tensors |= {f"first_stage_model.{name}": value for name, value in original_vae(family.vae).items()}
        encoders = {name: one for name, one in family.encoders.items() if isinstance(one, nn.Module)}
        if len(encoders) == 1:
            tensors |= _clip(encoders["text_encoder"], "cond_stage_model.transformer.text_model.")
        else:
            tensors |= _clip(encoders["text_encoder"], "conditioner.embedders.0.transformer.text_model.")
            tensors |= _open_clip(encoders["text_encoder_2"], "conditioner.embedders.1.model.")
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path)
    return path


def original_denoiser(family: ModelFamily) -> Tensors:
    """The denoiser's weights under their original names, without a prefix."""
    state, layers = dict(family.denoiser.state_dict()), list(family.native_layers(family.denoiser_config))
    tensors: Tensors = {}
    for layer in layers:
        for ending in (".weight", ".bias"):
            found = [state.pop(part + ending) for part in layer.parts if part + ending in state]
            if not found:
                continue
            value = torch.cat(found)
            two = ending == ".bias" and f"{layer.name}.weight" in tensors
            columns = tensors[f"{layer.name}.weight"].shape[1] if two else value.shape[-1]
            if layer.swapped and len(value) == 2 * columns:
                value = torch.cat(list(reversed(value.chunk(2))))
            tensors[layer.name + ending] = value
    rules = _norms(family.denoiser_name, layers)
    return tensors | {_renamed(name, rules): value for name, value in state.items()}


def original_vae(vae: nn.Module) -> Tensors:
    """A VAE's weights under the original names, in which its attention is a convolution."""
    tensors = {}
    for name, value in vae.state_dict().items():
        renamed = _renamed(name, _VAE)
        convolution = "attn_1" in renamed and renamed.endswith(".weight") and value.ndim == 2
        tensors[renamed] = value[:, :, None, None] if convolution else value
    return tensors


def _norms(denoiser: str, layers: list[Any]) -> dict[str, str]:
    if denoiser == "transformer":
        return _FLUX_NORMS if any("double_blocks" in layer.name for layer in layers) else _SD3_NORMS
    return dict(_unet_norms(layers))


def _unet_norms(layers: list[Any]) -> Iterator[tuple[str, str]]:
    for layer in layers:
        (part,) = layer.parts
        if part.endswith("conv1"):
            start, original = re.escape(part.removesuffix("conv1")), layer.name.removesuffix("in_layers.2")
            yield f"^{start}norm1", f"{original}in_layers.0"
            yield f"^{start}norm2", f"{original}out_layers.0"
        elif part.endswith(".proj_in"):
            yield f"^{re.escape(part.removesuffix('proj_in'))}", layer.name.removesuffix("proj_in")
    yield "conv_norm_out", "out.0"


def _clip(encoder: nn.Module, prefix: str) -> Tensors:
    return {prefix + name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}


def _open_clip(encoder: nn.Module, prefix: str) -> Tensors:
    state = dict(encoder.state_dict())
    tensors = {f"{prefix}text_projection": state.pop("text_projection.weight").T}
    for name in [name for name in state if "q_proj" in name]:
        joined = torch.cat([state.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"])
        original = _renamed(name, _OPEN_CLIP).replace("self_attn.q_proj.", "attn.in_proj_")
        tensors[prefix + original] = joined
    return tensors | {prefix + _renamed(name, _OPEN_CLIP): value for name, value in state.items()}


def _renamed(name: str, rules: dict[str, str]) -> str:
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name
