"""The interface of a file format of adapters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lit_lora.families import ModelFamily
from lit_lora.formats.tensor_file import TensorFile


@dataclass(frozen=True)
class AdapterFiles:
    """The contents of an adapter's files.

    Args:
        state: Tensors under PEFT's names without the adapter's name, such as ``base_model.model.….lora_A.weight``. Empty if
            the denoiser is not adapted.
        config: PEFT config as plain JSON values, with the name of the base; without an adapted part at most that name.
        metadata: What is known about the training, under the keys of sd-scripts (``ss_steps``) and of the model spec
            (``modelspec.trigger_phrase``); defaults to nothing.
        family: Model family of the base; defaults to None, an unknown one. Formats that rename layers need it.
        denoiser_config: Entries of the denoiser's config on which other tools' names of its layers depend; defaults to none,
            for a denoiser like that of the family's published models.
        text_encoders: Adapters of text encoders by the encoder's name in the pipeline, such as ``text_encoder_2``; defaults to
            none.
        new_tokens: Embeddings of new tokens, ``(n, D)``, by token and name of the text encoder; defaults to none.
    """

    state: Mapping[str, Tensor]
    config: Mapping[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)
    family: type[ModelFamily] | None = None
    denoiser_config: Mapping[str, Any] = field(default_factory=dict)
    text_encoders: Mapping[str, AdapterFiles] = field(default_factory=dict)
    new_tokens: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, AdapterFiles]:
        """The adapters of all adapted parts by name; that of the denoiser is called ``denoiser``."""
        return ({"denoiser": self} if self.state else {}) | dict(self.text_encoders)

    @property
    def main_config(self) -> Mapping[str, Any]:
        """PEFT config of the first adapted part, which is the denoiser's if it is adapted; without a part :attr:`config`."""
        return next((part.config for part in self.parts.values()), self.config)

    @property
    def base(self) -> str | None:
        """Name of the base that the adapter tells; None if it tells none."""
        names = [part.config.get("base_model_name_or_path") for part in (*self.parts.values(), self)]
        return next((str(name) for name in names if name), None)


class AdapterFormat(ABC):
    """A file format of adapters; a new format is one module in this folder and an entry in ``FORMATS``."""

    name: ClassVar[str]
    """Name in options such as ``--format``."""
    file_name: ClassVar[str]
    """Name of the file of tensors that :meth:`write` writes."""

    def holds(self, adapter: AdapterFiles) -> bool:
        """Whether the format can hold the adapter: :meth:`why_not` gives no reason against it."""
        return not self.why_not(adapter)

    @abstractmethod
    def why_not(self, adapter: AdapterFiles) -> str:
        """The reason why the format cannot hold an adapter, for error messages; empty if it can.

        Args:
            adapter: Adapter; its tensors are not looked at.
        """

    @abstractmethod
    def write(self, adapter: AdapterFiles, folder: Path) -> None:
        """Write an adapter that the format :meth:`holds`; the same adapter gives the same bytes.

        Args:
            adapter: Adapter to write.
            folder: Existing folder.
        """

    def files(self, path: Path) -> list[Path]:
        """All files of tensors of an adapter in this format, the given one first.

        Args:
            path: File that the format recognizes.
        """
        return [path]

    @abstractmethod
    def recognizes(self, file: TensorFile) -> bool:
        """Whether the names of a file's tensors are those of this format."""

    @abstractmethod
    def read(self, file: TensorFile, family: type[ModelFamily] | None = None) -> AdapterFiles:
        """Read an adapter.

        Args:
            file: File that the format recognizes.
            family: Model family of the base; defaults to the one that the file tells.

        Raises:
            UserError: If the file is damaged, or belongs to another family.
        """
