"""A model with every kind of layer that LoRA adapts, and adapters of it with random values."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from lit_lora.adapter_tools.lora_layer import LoraLayer
from lit_lora.adapter_tools.plain_lora import lora_layers
from lit_lora.adapters import adapter_state, plain_config
from lit_lora.formats import AdapterFiles

NAMES = ["conv", "grouped", "linear", "pointwise"]


class Layers(nn.Module):
    """Images, ``(B, 6, 8, 8)``, to vectors, ``(B, 10)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 8, 3, padding=1)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.grouped = nn.Conv2d(12, 8, 3, padding=1, groups=2)
        self.linear = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.grouped(self.pointwise(self.conv(images).tanh()).tanh()).tanh()
        return self.linear(hidden.mean((2, 3)))


def base() -> Layers:
    """The model, always with the same weights."""
    torch.manual_seed(5)
    return Layers().requires_grad_(False)


@contextmanager
def quiet() -> Iterator[None]:
    """A context without PEFT's warning that it cannot merge grouped convolutions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd layer with groups > 1")
        yield


def images() -> Tensor:
    return torch.randn(3, 6, 8, 8, generator=torch.Generator().manual_seed(1))


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": [*NAMES], **options})


def adapter(settings: PeftConfig, seed: int = 0, base_name: str = "a base") -> AdapterFiles:
    """An adapter of the model with random values."""
    with quiet():
        model = get_peft_model(base(), settings)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) / 4
    return AdapterFiles(adapter_state(model), plain_config(settings) | {"base_model_name_or_path": base_name})


def loaded(files: AdapterFiles) -> PeftModel:
    """The model with an adapter, as plain PEFT loads it."""
    with quiet():
        model = PeftModel(base(), PeftConfig.from_peft_type(**files.config)).eval()
    result = set_peft_model_state_dict(model, dict(files.state))
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key]
    return model


def layers_of(files: AdapterFiles) -> dict[str, LoraLayer]:
    return lora_layers(files, "the adapter")["denoiser"]


def without(files: AdapterFiles, layer: str) -> AdapterFiles:
    """The adapter without one layer's tensors."""
    state = {key: value for key, value in files.state.items() if f".{layer}." not in key}
    return AdapterFiles(state, files.config)
