"""A custom file format: the adapter as one safetensors file with its config in the metadata.

``python my_format.py runs/…/last.adapter`` writes the file for an adapter that a run has saved.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from diffusers import DiffusionPipeline
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lit_lora import UserError
from lit_lora.formats import AdapterFiles, AdapterFormat, PeftFormat

FILE = "adapter.safetensors"


class SingleFile(AdapterFormat):
    """``adapter.safetensors``: tensors under ``DENOISER.LAYER``, the PEFT config as JSON in the entry ``config``."""

    def holds(self, config: PeftConfig, pipeline_class: type[DiffusionPipeline]) -> bool:
        """Every adapter fits, since the config is kept as it is."""
        return True

    def write(
        self, adapter: AdapterFiles, folder: Path, pipeline_class: type[DiffusionPipeline], denoiser_name: str
    ) -> None:
        tensors = {f"{denoiser_name}.{name}": value.contiguous() for name, value in adapter.state.items()}
        # One entry, with sorted keys: the same adapter has to give the same bytes.
        save_file(tensors, folder / FILE, metadata={"config": json.dumps(dict(adapter.config), sort_keys=True)})

    def read(self, folder: Path, pipeline_class: type[DiffusionPipeline], denoiser_name: str) -> AdapterFiles:
        path = folder / FILE
        try:
            tensors = load_file(path)
            with safe_open(path, framework="pt") as opened:
                config = json.loads((opened.metadata() or {})["config"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}") from error
        prefix = f"{denoiser_name}."
        state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if not state:
            raise UserError(f"{path} holds no adapter of a {denoiser_name}")
        return AdapterFiles(state, config)


def convert(folder: Path, denoiser_name: str) -> Path:
    """Write the file into the folder of an adapter that has PEFT's files.

    Args:
        folder: What ``AdapterCheckpoint`` or ``save_adapter`` wrote.
        denoiser_name: The adapted part of the pipeline: ``unet`` or ``transformer``.
    """
    adapter = PeftFormat().read(folder, DiffusionPipeline, denoiser_name)
    SingleFile().write(adapter, folder, DiffusionPipeline, denoiser_name)
    return folder / FILE


if __name__ == "__main__":
    print(convert(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "unet"))
