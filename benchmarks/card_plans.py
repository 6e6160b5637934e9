"""What each model needs on a GPU, and with which settings it fits into 8, 12, 16 and 24 GB: ``python benchmarks/card_plans.py``.

Plans, not measurements: one step at the model's own size, batch 1, LoRA of rank 16, AdamW. The configs give the models' real
sizes; no weights are read. The settings are tried in the order of what they cost in time and exactness. Every plan adds a line to
the JSON file, and a plan that is in it is not made again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from environment import versions
from peft import LoraConfig
from real_models import write_pipeline

import lit_lora
from lit_lora import LoraDiffusion, MemoryOptions
from lit_lora.planning.device import find_device
from lit_lora.planning.plan_run import plan_run
from lit_lora.quantization import NF4, Dense, Int8, Quantization

MODELS = {
    "sd15": ("StableDiffusion", 512),
    "sdxl": ("StableDiffusionXL", 1024),
    "sd35_medium": ("StableDiffusion3", 1024),
    "sd35_large": ("StableDiffusion3", 1024),
    "pixart_sigma": ("PixArtSigma", 1024),
    "sana": ("Sana", 1024),
    "z_image": ("ZImage", 1024),
    "chroma": ("Chroma", 1024),
    "flux_dev": ("Flux", 1024),
    "flux_kontext": ("FluxKontext", 1024),
    "flux2_klein_4b": ("Flux2", 1024),
    "flux2_klein_9b": ("Flux2", 1024),
    "flux2_dev": ("Flux2", 1024),
    "krea2": ("Krea2", 1024),
    "qwen_image": ("QwenImage", 1024),
}
"""Models of benchmarks/real_models.py, smallest first, with their family and the edge of their images in pixels."""

CARDS = (8, 12, 16, 24)
"""Memory of the cards in GB."""

DEVICE = "RTX 4090"


_CHECKPOINTED = MemoryOptions(gradient_checkpointing=True)
_OFFLOADED = replace(_CHECKPOINTED, offload_activations=True, offload_blocks=True)


@dataclass(frozen=True)
class Setting:
    """Options of a run that decide how much memory it needs."""

    quantization: Quantization
    cached: bool = True
    memory: MemoryOptions = _CHECKPOINTED
    half_size: bool = False


SETTINGS = {
    "bf16": Setting(Dense(), cached=False),
    "bf16, cache": Setting(Dense()),
    "Int8, cache": Setting(Int8()),
    "NF4, cache": Setting(NF4()),
    "NF4, cache, offload": Setting(NF4(), memory=_OFFLOADED),
    "NF4, cache, offload, half the size": Setting(NF4(), memory=_OFFLOADED, half_size=True),
}
"""All with checkpointing; from fast to slow."""


def _plan(family: str, size: int, folder: Path, setting: Setting) -> dict[str, Any]:
    module = LoraDiffusion(
        getattr(lit_lora, family)(str(folder)),
        LoraConfig(r=16, lora_alpha=16),
        quantization=setting.quantization,
        memory=setting.memory,
    )
    size = size // 2 if setting.half_size else size
    cached = frozenset({"latents", "text"} if setting.cached else ())
    started = time.process_time()
    plan = plan_run(module, 1, size, size, device=find_device(DEVICE), cached=cached)
    return {
        "needed": plan.needed,
        "adapter": plan.adapter_file_bytes,
        "size": size,
        "seconds": time.process_time() - started,
    }


def _table(plans: dict[str, dict[str, Any]]) -> str:
    """Needed memory by setting, then for each card the first setting that fits, as a table of Markdown."""
    lines = [f"| | {' | '.join(SETTINGS)} | adapter |", "|---|" + "---|" * (len(SETTINGS) + 1)]
    cards = [f"| | {' | '.join(f'{card} GB' for card in CARDS)} |", "|---|" + "---|" * len(CARDS)]
    for model in MODELS:
        found = {name: plans[f"{model}/{name}"] for name in SETTINGS if f"{model}/{name}" in plans}
        if not found:
            continue
        sizes = [f"{found[name]['needed'] / 1e9:.1f} GB" if name in found else "" for name in SETTINGS]
        title = f"`{model}`, {MODELS[model][1]} px"
        lines.append(f"| {title} | {' | '.join(sizes)} | {next(iter(found.values()))['adapter'] / 1e6:.0f} MB |")
        first = [
            next((name for name, plan in found.items() if plan["needed"] <= card * 1e9), "does not fit")
            for card in CARDS
        ]
        cards.append(f"| {title} | {' | '.join(first)} |")
    return "\n".join([*lines, "", *cards])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="models to plan; defaults to all")
    parser.add_argument("--json", type=Path, default=Path("card_plans.json"), help="file with the plans so far")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    plans: dict[str, dict[str, Any]] = json.loads(options.json.read_text()) if options.json.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models or MODELS:
            path = write_pipeline(model, Path(folder) / model, weights=False)
            for name, setting in SETTINGS.items():
                key = f"{model}/{name}"
                if key not in plans:
                    plans[key] = _plan(*MODELS[model], path, setting)
                    options.json.write_text(json.dumps(plans, indent=1))
                    print(key, plans[key], flush=True)
                if plans[key]["needed"] <= min(CARDS) * 1e9:
                    break  # what costs more would not help
    print(f"planned as on an {DEVICE}, nothing measured; {versions('torch', 'diffusers', 'transformers', 'peft')}\n")
    print(_table(plans))


if __name__ == "__main__":
    main()
