"""Random batches and a plain Trainer for short training runs that are measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lit_lora.quantization
from lit_lora import LoraDiffusion, MemoryOptions


class RepeatedBatch(LightningDataModule):
    """The same batch in every step.

    Args:
        batch: The batch.
        count: Number of batches in an epoch, over all processes.
    """

    def __init__(self, batch: dict[str, Any], count: int) -> None:
        super().__init__()
        self.cached = ("latents", "text") if "latents_mean" in batch else ()
        self._batches = [batch] * count

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._batches, batch_size=None)  # type: ignore[arg-type]


def cached_batch(
    count: int,
    size: int,
    text_width: int = 768,
    pooled_width: int | None = None,
    downsampling: int = 8,
    tokens: int = 77,
    channels: int = 4,
) -> dict[str, Any]:
    """A batch with random latents and text embeddings, as a cache provides them.

    Args:
        count: Number of samples.
        size: Width and height of the images in pixels.
        text_width: Width of the text encoder's hidden states. Defaults to that of Stable Diffusion 1.5.
        pooled_width: Width of the pooled text embedding. Defaults to no pooled embedding.
        downsampling: Pixels for each latent value in a row. Defaults to that of Stable Diffusion's VAE.
        tokens: Number of tokens of the hidden states. Defaults to 77.
        channels: Channels of the latents. Defaults to 4.
    """
    text = {"encoder_hidden_states": torch.randn(count, tokens, text_width)}
    if pooled_width is not None:
        text["pooled"] = torch.randn(count, pooled_width)
    mean = torch.randn(count, channels, size // downsampling, size // downsampling)
    cached = {"latents_mean": mean, "latents_std": torch.ones_like(mean), "text_embeddings": text}
    return _captions(count, size) | cached


def image_batch(count: int, size: int) -> dict[str, Any]:
    """A batch with random images of ``size`` x ``size`` pixels."""
    return _captions(count, size) | {"pixel_values": torch.randint(256, (count, 3, size, size), dtype=torch.uint8)}


def _captions(count: int, size: int) -> dict[str, Any]:
    return {"caption": ["a photo of a cat"] * count, "target_size": torch.tensor([[size, size]] * count)}


def plain_trainer(device: str = "cpu", **options: Any) -> Trainer:
    """A Trainer without loggers, checkpoints and progress bar.

    Args:
        device: "cpu" or "cuda". Defaults to "cpu".
        **options: Further arguments of the Trainer.
    """
    return Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def module_options(setting: Mapping[str, Any], beside: Collection[str] = ()) -> dict[str, Any]:
    """Arguments of ``LoraDiffusion`` for a setting of a table.

    Args:
        setting: Arguments of ``LoraDiffusion`` and ``MemoryOptions`` by name; quantization and optimizer are names of classes.
        beside: Names in the setting that are neither. Defaults to none.
    """
    memory = {field.name for field in fields(MemoryOptions)}
    options = {name: value for name, value in setting.items() if name not in memory and name not in beside}
    options["memory"] = MemoryOptions(**{name: value for name, value in setting.items() if name in memory})
    if "quantization" in options:
        options["quantization"] = getattr(lit_lora.quantization, options["quantization"])()
    if "optimizer" in options:
        options["optimizer"] = resolve_name(options["optimizer"])
    return options


def draw_weights(module: LoraDiffusion, cached: bool) -> LoraDiffusion:
    """Let a module draw its weights instead of reading them.

    With data from a cache only the denoiser's are drawn, one by one, so that a large model needs no more memory than in training.
    """
    own: Any = module
    own.dispensable_parts = lambda: {"vae", "text"} if cached else set()
    if cached:
        # As an attribute: the source is a frozen dataclass.
        vars(own.family.source)["file_of"] = lambda part: SimpleNamespace(open=_drawn)
    else:
        own.family.load = partial(own.family.load, weights=False)
    return module


def _drawn(model: nn.Module, names: Sequence[str]) -> Callable[[str], Tensor]:
    """Draws each weight of a model by its name, about as large as PyTorch's layers draw theirs."""
    shapes = {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.state_dict().items())}

    def draw(name: str) -> Tensor:
        shape = shapes[name]
        if len(shape) < 2:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        bound = math.prod(shape[1:]) ** -0.5
        return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound)

    return draw
