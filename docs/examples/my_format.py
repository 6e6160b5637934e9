"""A custom file format: the adapter as one safetensors file with its config in the metadata.

``python my_format.py runs/…/last.adapter`` writes the file for an adapter that a run has saved.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import ClassVar

from safetensors.torch import save_file

from lit_lora import ModelFamily, UserError
from lit_lora.formats import AdapterFiles, AdapterFormat, TensorFile
from lit_lora.formats.find import read_adapter

PREFIX = "denoiser."


class SingleFile(AdapterFormat):
    """``adapter.safetensors``: tensors under ``denoiser.LAYER``, the PEFT config as JSON in the metadata."""

    name: ClassVar[str] = "single_file"
    file_name: ClassVar[str] = "adapter.safetensors"

    def why_not(self, adapter: AdapterFiles) -> str:
        """Every adapter of a denoiser fits, since the config is kept as it is."""
        return "it has no place for text encoders" if adapter.text_encoders else ""

    def write(self, adapter: AdapterFiles, folder: Path) -> None:
        tensors = {PREFIX + name: value.contiguous() for name, value in adapter.state.items()}
        # One entry, with sorted keys: the same adapter has to give the same bytes.
        save_file(
            tensors, folder / self.file_name, metadata={"config": json.dumps(dict(adapter.config), sort_keys=True)}
        )

    def recognizes(self, file: TensorFile) -> bool:
        return bool(file.tensors) and all(name.startswith(PREFIX) for name in file.tensors)

    def read(self, file: TensorFile, family: type[ModelFamily] | None = None) -> AdapterFiles:
        try:
            config = json.loads(file.metadata["config"])
        except (KeyError, ValueError) as error:
            raise UserError(f"the metadata of {file.path} holds no config: {error}") from error
        state = {name.removeprefix(PREFIX): value for name, value in file.tensors.items()}
        return AdapterFiles(state, config, family=family)


def convert(folder: Path) -> Path:
    """Write the file into the folder of an adapter.

    Args:
        folder: What ``AdapterCheckpoint`` or ``save_adapter`` wrote.
    """
    SingleFile().write(read_adapter(folder), folder)
    return folder / SingleFile.file_name


if __name__ == "__main__":
    print(convert(Path(sys.argv[1])))
