"""The fixture with a tiny pipeline for each family; tests of contracts go through all of them."""

from __future__ import annotations

from lit_lora.families import Flux, ModelFamily, StableDiffusion, StableDiffusion3, StableDiffusionXL, families
from lit_lora.objectives import FlowMatching
from tests.families.tiny import MODULES, VARIANTS

FOLDERS: dict[type[ModelFamily], str] = {
    StableDiffusion: "sd_folder",
    StableDiffusionXL: "sdxl_folder",
    StableDiffusion3: "sd3_folder",
    Flux: "flux_folder",
    **{module.FAMILY: f"{name}_folder" for name, module in MODULES.items()},
}

BASES: dict[str, tuple[type[ModelFamily], str]] = {
    **{kind.__name__: (kind, fixture) for kind, fixture in FOLDERS.items()},
    **{name: (module.FAMILY, f"{name}_folder") for name, (module, _) in VARIANTS.items()},
}
"""Each family with its fixture, and models of families that have another pipeline or other text encoders."""

FLOW_FOLDERS = {kind: fixture for kind, fixture in FOLDERS.items() if kind.default_objective is FlowMatching}
"""Those of families that are trained by flow matching."""


def families_of_the_package() -> set[type[ModelFamily]]:
    """All families that are defined in the package."""
    return {kind for kind in families() if kind.__module__.startswith("lit_lora.families.")}
