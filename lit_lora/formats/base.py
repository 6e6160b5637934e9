"""What a file format of adapters is."""

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
    """An adapter on its way to or from files.

    Args:
        state: Its tensors under PEFT's names without the adapter's name, such as ``base_model.model.….lora_A.weight``.
        config: Its PEFT config as plain JSON values, with the base's name.
    """

    state: Mapping[str, Tensor]
    config: Mapping[str, Any]


class AdapterFormat(ABC):
    """A file format of adapters; a new one is a file in this folder and an entry in ``FORMATS``."""

    @abstractmethod
    def holds(self, config: PeftConfig, pipeline_class: type[DiffusionPipeline]) -> bool:
        """Whether an adapter of this config, trained for this pipeline, can be written in the format."""

    @abstractmethod
    def write(
        self, adapter: AdapterFiles, folder: Path, pipeline_class: type[DiffusionPipeline], denoiser_name: str
    ) -> None:
        """Write an adapter that the format :meth:`holds`; the same adapter gives the same bytes.

        Args:
            adapter: The adapter.
            folder: An existing folder.
            pipeline_class: The pipeline that the adapter was trained for.
            denoiser_name: The adapted part of it: ``unet`` or ``transformer``.
        """

    @abstractmethod
    def read(self, folder: Path, pipeline_class: type[DiffusionPipeline], denoiser_name: str) -> AdapterFiles:
        """Read what :meth:`write` has written.

        Raises:
            UserError: If there is no such file, or it is damaged.
        """
