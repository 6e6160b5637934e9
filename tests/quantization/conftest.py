from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def sd_folder(shallow_sd_folder: Path) -> Path:
    """A Stable Diffusion pipeline with a shallow UNet: what is tested is the same in each layer, and each one takes time."""
    return shallow_sd_folder
