"""The contents of the files for an adapter in a loaded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lit_lora.adapters import ADAPTER_NAME, method_of, plain_config
from lit_lora.adapters.state import adapter_tensors
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily
from lit_lora.formats import format_named
from lit_lora.formats.base import AdapterFiles


def files_of(
    family: ModelFamily, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> AdapterFiles:
    """The contents of the files for the adapter in a family's denoiser.

    Args:
        family: Family whose denoiser has the adapter.
        state: Tensors of the adapter: see :func:`lit_lora.adapters.adapter_state`.
        metadata: What is known about the training; defaults to nothing.
    """
    # PEFT's save_pretrained names the adapted model in the same way.
    model = {"base_model_class": family.denoiser_class.__name__, "parent_library": family.denoiser_class.__module__}
    of_base = {"base_model_name_or_path": family.pretrained_model_name_or_path, "auto_mapping": model}
    trained = family.denoiser.peft_config[ADAPTER_NAME]
    tensors, config = method_of(trained).export(family.denoiser, state, plain_config(trained) | of_base)
    return AdapterFiles(tensors, config, metadata or {}, type(family), family.naming_config)


def check_formats(family: ModelFamily, formats: Sequence[str]) -> None:
    """Check that the adapter in a family's denoiser can be written in some formats, before it is trained.

    Args:
        family: Family whose denoiser has the adapter.
        formats: Names of formats.

    Raises:
        UserError: If a format is not known or cannot hold the adapter.
    """
    adapter = files_of(family, adapter_tensors(family.denoiser))
    for one in map(format_named, formats):
        if reason := one.why_not(adapter):
            raise UserError(
                f"formats: the adapter cannot be written in the format {one.name}: {reason}; leave {one.name} out"
            )
