"""Short runs of any family: ``python -m tests.families.two_processes FOLDER SHARDS FAMILY=BASE …`` makes all of one process.

The adapter of each run is written to ``FOLDER/FAMILY-RUN.safetensors``.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from peft import LoraConfig
from safetensors.torch import save_file

from lit_lora import families, quantization
from lit_lora.datamodules import ImageDecoder, WebDatasetDataModule
from lit_lora.memory.options import MemoryOptions
from lit_lora.module import LoraDiffusion
from tests.distributed.scenarios import adapter

WORLD = int(os.environ.get("WORLD_SIZE", 1))

RUNS = {
    "ddp live": ("ddp", "Int8", False),
    "ddp cached": ("ddp", "NF4", True),
    "fsdp live": ("lit_lora_fsdp", "NF4", False),
    "fsdp cached": ("lit_lora_fsdp", "Int8", True),
    "fsdp text": ("lit_lora_fsdp", "NF4", False),
}
"""Strategy, quantization, and whether the data come from a cache, by the name of the run: each pair of choices occurs. In the
last one, text encoders get an adapter too."""


def takes_part(family: str, name: str) -> bool:
    """Whether a family has this run: not all have text encoders that can be trained."""
    return "text" not in name or bool(getattr(families, family).adaptable_encoders)


def module_of(family: str, base: Path, stored: str, text: bool = False) -> LoraDiffusion:
    """A module with quantized text encoders, whose adapter does not begin with zeros, and which rounding errors hardly change."""
    torch.manual_seed(9)
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False)
    return LoraDiffusion(
        getattr(families, family)(str(base)),
        config,
        text_adapter=config if text else None,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        quantization=getattr(quantization, stored)(),
        base_dtype="float32",
        memory=MemoryOptions(text_encoder_quantization=quantization.NF4()),
        seed=4,
    )


def data_of(shards: Path, batch_size: int) -> WebDatasetDataModule:
    """Samples whose images are framed in one way, as in a cache."""
    decoder = ImageDecoder(center_crop=True)
    return WebDatasetDataModule(
        str(shards), resolution=16, batch_size=batch_size, num_workers=0, seed=4, decoder=decoder
    )


def train(
    family: str, base: Path, shards: Path, strategy: str, stored: str, folder: Path, text: bool = False
) -> dict[str, torch.Tensor]:
    """Train for two steps of four samples; return the adapter."""
    options: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(
        accelerator="cpu", devices=WORLD, strategy=strategy, max_steps=2, default_root_dir=folder, **options
    )
    module = module_of(family, base, stored, text)
    trainer.fit(module, data_of(shards, 4 // WORLD))
    return {name: value.contiguous() for name, value in adapter(module).items()}


def main() -> None:
    folder, shards = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for argument in sys.argv[3:]:
        family, _, base = argument.partition("=")
        for name, (strategy, stored, cached) in RUNS.items():
            if not takes_part(family, name):
                continue
            source = folder / family / "cache" if cached else shards
            trained = train(family, Path(base), source, strategy, stored, folder / family, "text" in name)
            if os.environ["RANK"] == "0":
                save_file(trained, folder / f"{family}-{name}.safetensors")


if __name__ == "__main__":
    main()
