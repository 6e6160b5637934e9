from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig

from lit_lora.adapters.methods import AdapterMethod, method_of


@pytest.fixture(scope="session")
def sd_folder(shallow_sd_folder: Path) -> Path:
    """A Stable Diffusion pipeline with a shallow UNet: what is asserted holds layer by layer, and each layer takes time."""
    return shallow_sd_folder


@pytest.fixture
def make_config() -> Callable[[type[AdapterMethod]], PeftConfig]:
    """Makes a LoRA config that belongs to an adapter method of a test's own."""

    def make(method: type[AdapterMethod]) -> PeftConfig:
        @dataclass
        class OwnConfig(LoraConfig):
            pass

        method_of.register(OwnConfig, lambda config: method())
        return OwnConfig(r=2, lora_alpha=2)

    return make
