"""The interface of a file format of adapters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import Tensor


@dataclass(frozen=True)
class AdapterFiles:
    """The contents of an adapter's files.

    Args:
        state: Tensors under PEFT's names without the adapter's name, such as ``base_model.model.….lora_A.weight``.
        config: PEFT config as plain JSON values, with the name of the base.
    """

    state: Mapping[str, Tensor]
    config: Mapping[str, Any]


class AdapterFormat(ABC):
    """A file format of adapters; a new format is one module in this folder and an entry in ``FORMATS``."""

    @abstractmethod
    def holds(self, config: PeftConfig, pipeline_class: type[DiffusionPipeline]) -> bool:
        """Whether the format can hold an adapter of this config for this pipeline."""

    @abstractmethod
    def write(
        self, adapter: AdapterFiles, folder: Path, pipeline_class: type[DiffusionPipeline], denoiser_name: str
    ) -> None:
        """Write an adapter that the format :meth:`holds`; the same adapter gives the same bytes.

        Args:
            adapter: Adapter to write.
            folder: Existing folder.
            pipeline_class: Pipeline for which the adapter was trained.
            denoiser_name: Name of the adapted part of the pipeline: ``unet`` or ``transformer``.
        """

    @abstractmethod
    def read(self, folder: Path, pipeline_class: type[DiffusionPipeline], denoiser_name: str) -> AdapterFiles:
        """Read an adapter that :meth:`write` wrote.

        Args:
            folder: Folder of the adapter.
            pipeline_class: Pipeline for which the adapter was trained.
            denoiser_name: Name of the adapted part of the pipeline: ``unet`` or ``transformer``.

        Raises:
            UserError: If the file is missing or damaged.
        """
