"""Planned memory of training transformers at 1024 px, batch 1, rank 16: ``python benchmarks/transformer_plans.py [MODEL …]``.

The configs give the models' real sizes; no weights are read.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

from peft import LoraConfig
from real_models import write_pipeline

from lit_lora import Flux, Flux2, Krea2, LoraDiffusion, MemoryOptions, ModelFamily, QwenImage, StableDiffusion3, ZImage
from lit_lora.planning.device import find_device
from lit_lora.planning.plan_run import plan_run
from lit_lora.quantization import NF4, Dense, Int8, Quantization

MODELS: dict[str, type[ModelFamily]] = {
    "sd35_medium": StableDiffusion3,
    "sd35_large": StableDiffusion3,
    "flux_dev": Flux,
    "z_image": ZImage,
    "qwen_image": QwenImage,
    "krea2": Krea2,
    "flux2_dev": Flux2,
    "flux2_klein_9b": Flux2,
    "flux2_klein_4b": Flux2,
}
SETTINGS: dict[str, tuple[Quantization, bool]] = {
    "bfloat16, checkpointing": (Dense(), False),
    "bfloat16, checkpointing, caches": (Dense(), True),
    "Int8, checkpointing, caches": (Int8(), True),
    "NF4, checkpointing, caches": (NF4(), True),
}


def main(names: list[str]) -> None:
    """Print the plans of some models as a table."""
    print(
        f"{'model':<12} {'setting':<34} {'forward':>9} {'backward':>9} {'peak':>9} {'needed':>9} {'adapter':>9}  (GB, 'H100')"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = write_pipeline(name, Path(folder) / name, weights=False)
            for setting, (quantization, cached) in SETTINGS.items():
                module = LoraDiffusion(
                    MODELS[name](str(path)),
                    LoraConfig(r=16, lora_alpha=16),
                    quantization=quantization,
                    memory=MemoryOptions(gradient_checkpointing=True),
                )
                parts = frozenset({"latents", "text"} if cached else ())
                plan = plan_run(module, 1, 1024, 1024, device=find_device("H100"), cached=parts)
                phases = [sum(plan.phases[phase].values()) for phase in ("forward", "backward")]
                sizes = [*phases, plan.peak, plan.needed, plan.adapter_file_bytes]
                print(f"{name:<12} {setting:<34} " + " ".join(f"{size / 1e9:9.2f}" for size in sizes), flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(sys.argv[1:] or list(MODELS))
