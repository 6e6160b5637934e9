"""File formats of adapters: one module for each."""

import os
import re
from pathlib import Path

from diffusers import DiffusionPipeline
from peft import PeftConfig
from safetensors import SafetensorError

from lit_lora.formats.base import AdapterFiles, AdapterFormat
from lit_lora.formats.diffusers import DiffusersFormat
from lit_lora.formats.peft import PeftFormat

FORMATS: tuple[AdapterFormat, ...] = (PeftFormat(), DiffusersFormat())
"""All formats; an adapter is written in each one that can hold it."""

__all__ = ["FORMATS", "AdapterFiles", "AdapterFormat", "DiffusersFormat", "PeftFormat", "write_adapter"]


def write_adapter(
    adapter: AdapterFiles,
    config: PeftConfig,
    folder: Path,
    pipeline_class: type[DiffusionPipeline],
    denoiser_name: str,
) -> None:
    """Write an adapter in every format that can hold it.

    Args:
        adapter: Adapter to write.
        config: Config of the adapter.
        folder: Existing folder.
        pipeline_class: Pipeline for which the adapter was trained.
        denoiser_name: Name of the adapted part of the pipeline: ``unet`` or ``transformer``.

    Raises:
        OSError: If the disk is full or the folder cannot be written.
    """
    for one in FORMATS:
        if one.holds(config, pipeline_class):
            try:
                one.write(adapter, folder, pipeline_class, denoiser_name)
            except SafetensorError as error:
                if found := re.search(r"\(os error (\d+)\)", str(error)):
                    raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) from error
                raise
