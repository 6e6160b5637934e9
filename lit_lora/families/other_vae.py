"""The check of a VAE that replaces the pipeline's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lit_lora.errors import UserError
from lit_lora.families.source import ModelSource


def check_other_vae(source: ModelSource, kind: type[Any], config: Mapping[str, Any]) -> None:
    """Check that a VAE makes latents of the shape and scale of the pipeline's own; a pipeline may also have none.

    Args:
        source: Source with the VAE.
        kind: Class of the VAE.
        config: Config of the VAE, complete with defaults.

    Raises:
        UserError: If latents have other channels, another size or another normalization.
    """
    own = replace(source, vae=None)
    if own.lacks("vae"):
        return
    expected = own.config_of("vae", kind)
    for name in ("latent_channels", "scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        if config.get(name) != expected.get(name):
            _refuse(source, name, config.get(name), expected.get(name))
    levels, own_levels = (len(one.get("block_out_channels") or ()) for one in (config, expected))
    if levels != own_levels:
        _refuse(source, "number of block_out_channels", levels, own_levels)


def _refuse(source: ModelSource, name: str, found: object, expected: object) -> None:
    raise UserError(
        f"vae={source.vae!r} does not fit {source}: its {name} is {found}, and the denoiser was trained on latents of a VAE with "
        f"{expected}; name a VAE of the same kind of model"
    )
