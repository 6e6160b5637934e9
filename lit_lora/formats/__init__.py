"""File formats of adapters: one file each."""

from pathlib import Path

from diffusers import DiffusionPipeline
from peft import PeftConfig

from lit_lora.formats.base import AdapterFiles, AdapterFormat
from lit_lora.formats.diffusers import DiffusersFormat
from lit_lora.formats.peft import PeftFormat

FORMATS: tuple[AdapterFormat, ...] = (PeftFormat(), DiffusersFormat())
"""All formats that an adapter's folder has, where they can hold it."""

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
        adapter: The adapter.
        config: Its config.
        folder: An existing folder.
        pipeline_class: The pipeline that it was trained for.
        denoiser_name: The adapted part of it: ``unet`` or ``transformer``.
    """
    for one in FORMATS:
        if one.holds(config, pipeline_class):
            one.write(adapter, folder, pipeline_class, denoiser_name)
