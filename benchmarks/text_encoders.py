"""Weights of the text encoders by quantization, at their real sizes: ``python benchmarks/text_encoders.py``.

Computed from the configs of benchmarks/real_models.py, without weights.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import torch
from card_plans import MODELS
from environment import versions
from real_models import write_pipeline
from torch import nn

import lit_lora
from lit_lora.planning.fake_module import fake_tensors
from lit_lora.quantization import NF4, Dense, Int8, Quantization

KINDS: tuple[Quantization, ...] = (Dense(), Int8(), NF4())


def main(names: list[str]) -> None:
    """Print a table of the text encoders of some models."""
    print(f"weights in GB, base_dtype bfloat16; {versions('torch', 'transformers')}")
    print(f"{'model':<15} {'encoder':<15} {'class':<36}{'bfloat16':>9}{'Int8':>6}{'NF4':>6}")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = write_pipeline(name, Path(folder) / name, weights=False)
            sizes: dict[str, list[float]] = {}
            kinds: dict[str, str] = {}
            for quantization in KINDS:
                family = getattr(lit_lora, MODELS[name][0])(str(path))
                family.text_quantization = quantization
                with fake_tensors():
                    family.load(torch.bfloat16, without={"vae", "denoiser"}, weights=False)
                for encoder, model in family.encoders.items():
                    if isinstance(model, nn.Module):
                        sizes.setdefault(encoder, []).append(sum(p.nbytes for p in model.parameters()) / 1e9)
                        kinds[encoder] = type(model).__name__
            for encoder, found in sizes.items():
                print(
                    f"{name:<15} {encoder:<15} {kinds[encoder]:<36}{found[0]:>9.1f}{found[1]:>6.1f}{found[2]:>6.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(sys.argv[1:] or list(MODELS))
