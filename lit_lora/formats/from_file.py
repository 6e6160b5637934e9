"""An adapter to go on training, in place of a PEFT config."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftConfig, PeftModel
from torch import Tensor

from lit_lora.adapters import set_adapter_state
from lit_lora.argument_types import check_types
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily
from lit_lora.formats.base import AdapterFiles
from lit_lora.formats.base_records import Records, base_records, same_adapters, told
from lit_lora.formats.find import read_adapter
from lit_lora.formats.known_base import changed_base
from lit_lora.formats.learned_settings import changed_settings
from lit_lora.formats.quantized_base import quantization_name, quantized_base, quantized_metadata
from lit_lora.formats.text_encoders import for_class, for_encoder
from lit_lora.quantization import Quantization

_OF_THE_FIRST_TRAINING = (
    "base_model_name_or_path",
    "auto_mapping",
    "init_lora_weights",
    "init_weights",
    "runtime_config",
)
"""Entries of the file's config that do not count here: the base is named anew, and values are not initialized."""


@dataclass
class FromFile(PeftConfig):
    """Continues the training of an adapter that was saved as files, with its method, ranks, alphas and values.

    Optimizer and schedule start anew; to resume a run, use a checkpoint.

    Args:
        path: File or folder of the adapter, as this project, PEFT, diffusers, kohya's scripts, ComfyUI or LyCORIS write it, or
            the file of a new token's embedding. It must be given.
        drop_text_encoders: Leave out those parts of the adapter that change text encoders, and its new tokens, so that it is
            saved without them. Defaults to False: they are trained too.

    Raises:
        UserError: If there is no path.
    """

    path: str = ""  # PEFT's configs are dataclasses whose entries all have defaults
    drop_text_encoders: bool = False
    # Entries of PEFT's configs that the file gives.
    task_type: str | None = field(default=None, init=False)
    peft_type: str | None = field(default=None, init=False)
    auto_mapping: dict[str, str] | None = field(default=None, init=False)
    peft_version: str | None = field(default=None, init=False)
    base_model_name_or_path: str | None = field(default=None, init=False)
    revision: str | None = field(default=None, init=False)
    inference_mode: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        super().__post_init__()
        if not self.path:
            raise UserError("FromFile needs a path: the file or folder of the adapter to go on with")
        self._family: type[ModelFamily] | None = None

    def config(
        self, family: type[ModelFamily], base: Records = (), quantization: Quantization | None = None
    ) -> PeftConfig | None:
        """The PEFT config of the denoiser's adapter; None if only text encoders are adapted.

        Warns if the adapter was trained over other adapters than this training, or made for a base that is quantized otherwise.

        Args:
            family: Model family of the base.
            base: Adapters that this training is over; defaults to none.
            quantization: Quantization of the base; defaults to none.

        Raises:
            UserError: If there is no complete adapter at the path, it belongs to another family, or nothing of it would be
                trained.
        """
        self._family = family
        files = self._files
        if self.drop_text_encoders and not files.state:
            raise UserError(
                f"the adapter {self.path} changes text encoders or has new tokens alone, and drop_text_encoders leaves "
                f"nothing of it; set it to false"
            )
        if not same_adapters(before := base_records(files.metadata), base):
            warnings.warn(
                f"the adapter {self.path} was trained over {told(before)}, and this training is over {told(base)}; set "
                f"model.base_adapters to go on as before",
                stacklevel=2,
            )
        made_for = quantized_base(files.metadata)
        if made_for and made_for != quantization_name(quantization):
            warnings.warn(
                f"the adapter {self.path} was made for the base quantized by {made_for}, and this training has "
                f"{quantization_name(quantization)}; set model.quantization to go on as before",
                stacklevel=2,
            )
        return self._config(files) if files.state else None

    def warn_of_changes(self, module: Any) -> None:
        """Warn of what this training learns otherwise than the adapter's: base, objective, schedule, options of the family.

        Args:
            module: :class:`~lit_lora.LoraDiffusion` whose objective is prepared.

        Raises:
            UserError: If the file's metadata are damaged.
        """
        family = module.family
        changed = changed_base(self._files, family.pretrained_model_name_or_path, family.base_identity)
        if changed := [f"the base's {one}" for one in changed] + changed_settings(self._files.metadata, module):
            rank_zero_warn(
                f"the adapter {self.path} was trained otherwise: {'; '.join(changed)}. Those of this training apply; set them as "
                f"they were to go on as before"
            )

    def training_facts(self, quantization: Quantization | None) -> dict[str, str]:
        """What the file says that also holds for the files of this training.

        Args:
            quantization: Quantization of the base.
        """
        same = quantized_base(self._files.metadata) == quantization_name(quantization)
        return quantized_metadata(quantization) if same else {}

    def text_configs(self, family: type[ModelFamily]) -> dict[str, PeftConfig]:
        """The PEFT configs of the text encoders' adapters by the encoders' names; none with ``drop_text_encoders``.

        Args:
            family: Model family of the base.

        Raises:
            UserError: As for :meth:`config`, or if a text encoder cannot be trained.
        """
        self._family = family
        parts = {} if self.drop_text_encoders else self._files.text_encoders
        if others := [name for name in parts if name not in family.adaptable_encoders]:
            raise UserError(
                f"the adapter {self.path} also changes {' and '.join(others)}, which cannot be trained in {family.__name__}: "
                f"they would be lost; set drop_text_encoders to true to train and save it without text encoders"
            )
        kinds = family.encoder_classes
        return {name: self._config(for_class(part, kinds[name])) for name, part in parts.items()}

    def new_tokens(self, family: type[ModelFamily]) -> dict[str, Mapping[str, Tensor]]:
        """Embeddings of the file's new tokens by token and text encoder; none with ``drop_text_encoders``.

        Args:
            family: Model family of the base.

        Raises:
            UserError: As for :meth:`config`.
        """
        self._family = family
        return {} if self.drop_text_encoders else dict(self._files.new_tokens)

    def start(self, model: PeftModel) -> None:
        """Set the values of an injected adapter of the denoiser to the file's.

        Args:
            model: Model with an adapter of :meth:`config`.

        Raises:
            UserError: If tensors are missing, unknown or of other shapes.
        """
        set_adapter_state(model, self._files.state, self.path)

    def start_text(self, name: str, model: PeftModel) -> None:
        """Set the values of an injected adapter of a text encoder to the file's.

        Args:
            name: Name of the text encoder.
            model: Text encoder with an adapter of :meth:`text_configs`.

        Raises:
            UserError: If tensors are missing, unknown or of other shapes.
        """
        part = for_encoder(self._files.text_encoders[name], model.get_base_model())
        set_adapter_state(model, part.state, self.path)

    def _config(self, files: AdapterFiles) -> PeftConfig:
        options = {name: value for name, value in files.config.items() if name not in _OF_THE_FIRST_TRAINING}
        try:
            return PeftConfig.from_peft_type(**{**options, "inference_mode": False})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the config of the adapter {self.path} is not one that this version of PEFT takes: {error}"
            ) from error

    @cached_property
    def _files(self) -> AdapterFiles:
        return read_adapter(Path(self.path), self._family)
