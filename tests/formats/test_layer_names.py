"""Names of layers are those that other tools know, compared with lists of their own names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from braceexpand import braceexpand
from diffusers import (
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from torch import nn

from lit_lora.families import (
    Chroma,
    Flux,
    Flux2,
    Krea2,
    ModelFamily,
    PixArtSigma,
    QwenImage,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    ZImage,
)
from lit_lora.formats import ComfyUIFormat, KohyaFormat, LycorisFormat
from lit_lora.formats.layer_names import places

FAMILIES = (
    *(StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, Flux2, Chroma, PixArtSigma),
    *(ZImage, QwenImage, Krea2),
)

# The configs of the published denoisers, as far as they are not diffusers' defaults and names depend on them.
PUBLISHED: dict[type[ModelFamily], tuple[type[nn.Module], dict[str, Any]]] = {
    StableDiffusion: (UNet2DConditionModel, {"cross_attention_dim": 768}),
    StableDiffusionXL: (
        UNet2DConditionModel,
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    StableDiffusion3: (SD3Transformer2DModel, {"num_layers": 24, "dual_attention_layers": tuple(range(13))}),
    Flux: (FluxTransformer2DModel, {"guidance_embeds": True}),
    Flux2: (Flux2Transformer2DModel, {}),
    ZImage: (ZImageTransformer2DModel, {}),
    Chroma: (ChromaTransformer2DModel, {}),
    PixArtSigma: (PixArtTransformer2DModel, {"caption_channels": 4096, "use_additional_conditions": True}),
    QwenImage: (QwenImageTransformer2DModel, {}),
    Krea2: (Krea2Transformer2DModel, {}),
}


def listed(name: str, family: type[ModelFamily]) -> set[str]:
    """The names of a family in one of the lists in ``data``; none if the tool does not know the family."""
    found: dict[str, list[str]] = {}
    for line in (Path(__file__).parent / "data" / name).read_text().splitlines():
        if line.startswith("["):
            names = found.setdefault(line.strip("[]"), [])
        elif not line.startswith("#"):
            names += braceexpand(line)
    return set(found.get(family.__name__, ()))


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def published(request: pytest.FixtureRequest) -> tuple[type[ModelFamily], set[str], dict[str, Any]]:
    """A family, its published denoiser's linear layers and convolutions, and the denoiser's config."""
    family: type[ModelFamily] = request.param
    kind, options = PUBLISHED[family]
    with torch.device("meta"):
        model: Any = kind(**options)
    layers = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    return family, layers, {name: model.config[name] for name in family.naming}


def test_every_layer_has_one_name_and_is_told_by_it(
    published: tuple[type[ModelFamily], set[str], dict[str, Any]],
) -> None:
    family, layers, config = published
    for written in (KohyaFormat(), ComfyUIFormat(), LycorisFormat()):
        known = places(family, config)
        names = dict(written.layers(family, config))
        assert len(names) == len(list(written.layers(family, config)))
        parts = [part for layer in names.values() for part in layer.parts]
        assert len(parts) == len(set(parts))
        assert layers <= set(parts)
        assert all(known[name].layer.parts == layer.parts for name, layer in names.items())


def test_comfyui_knows_every_name(published: tuple[type[ModelFamily], set[str], dict[str, Any]]) -> None:
    family, layers, config = published
    of_weights = {f"diffusion_model.{name}" for name in listed("native_names.txt", family)}
    for name, layer in ComfyUIFormat().layers(family, config):
        assert name in of_weights or not layers & set(layer.parts), name
    written = {name for name, layer in ComfyUIFormat().layers(family, config)}
    assert written >= of_weights


def test_kohya_knows_every_name(published: tuple[type[ModelFamily], set[str], dict[str, Any]]) -> None:
    """Its lists have the layers that its networks train; the names of all others follow the same rule."""
    family, layers, config = published
    theirs = listed("kohya_names.txt", family)
    written = {name: layer for name, layer in KohyaFormat().layers(family, config) if layers & set(layer.parts)}
    assert written.keys() >= {name for name in theirs if name.startswith("lora_unet_")}
    assert places(family, config).keys() >= theirs
    if family is not StableDiffusion:  # which kohya's scripts train in diffusers' code
        of_weights = {f"lora_unet_{name.replace('.', '_')}" for name in listed("native_names.txt", family)}
        assert written.keys() <= of_weights


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_text_encoders_of_kohya(family: type[ModelFamily]) -> None:
    known = places(family, {})
    for name in listed("kohya_names.txt", family):
        if name.startswith("lora_te"):
            part = {"lora_te": "text_encoder"} | {prefix: part for part, prefix in family.kohya_encoders.items()}
            assert known[name].part == part[name.split("_text_model")[0].split("_encoder")[0]]
