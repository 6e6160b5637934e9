"""An adapter to go on training, in place of a PEFT config."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from peft import PeftConfig, PeftModel

from lit_lora.adapters import set_adapter_state
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily
from lit_lora.formats.base import AdapterFiles
from lit_lora.formats.base_records import Records, base_records, same_adapters, told
from lit_lora.formats.find import read_adapter

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
        path: File or folder of the adapter, as this project, PEFT, diffusers, kohya's scripts, ComfyUI or LyCORIS write it.
        drop_text_encoders: Train without those parts of the adapter that change text encoders, and save it without them.
            Defaults to False, so that such an adapter is refused.

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
        super().__post_init__()
        if not self.path:
            raise UserError("FromFile needs a path: the file or folder of the adapter to go on with")
        self._family: type[ModelFamily] | None = None

    def config(self, family: type[ModelFamily], base: Records = ()) -> PeftConfig:
        """The adapter's PEFT config; warns if the adapter was trained over other adapters than this training.

        Args:
            family: Model family of the base.
            base: Adapters that this training is over; defaults to none.

        Raises:
            UserError: If there is no complete adapter at the path, it belongs to another family, or it changes text encoders.
        """
        self._family = family
        files = self._files
        if files.text_encoders and not self.drop_text_encoders:
            raise UserError(
                f"the adapter {self.path} also changes {' and '.join(files.text_encoders)}, which training does not: they would "
                f"be lost; set drop_text_encoders to true to train and save it without them"
            )
        if not same_adapters(before := base_records(files.metadata), base):
            warnings.warn(
                f"the adapter {self.path} was trained over {told(before)}, and this training is over {told(base)}; set "
                f"model.base_adapters to go on as before",
                stacklevel=2,
            )
        if not files.state:
            raise UserError(
                f"the adapter {self.path} changes text encoders alone, so there is nothing to go on training"
            )
        options = {name: value for name, value in files.config.items() if name not in _OF_THE_FIRST_TRAINING}
        try:
            return PeftConfig.from_peft_type(**{**options, "inference_mode": False})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the config of the adapter {self.path} is not one that this version of PEFT takes: {error}"
            ) from error

    def start(self, model: PeftModel) -> None:
        """Set the values of an injected adapter to the file's.

        Args:
            model: Model with an adapter of :meth:`config`.

        Raises:
            UserError: If tensors are missing, unknown or of other shapes.
        """
        set_adapter_state(model, self._files.state, self.path)

    @cached_property
    def _files(self) -> AdapterFiles:
        return read_adapter(Path(self.path), self._family)
