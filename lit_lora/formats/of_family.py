"""The contents of the files for an adapter in a loaded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor

from lit_lora.adapters import ADAPTER_NAME, plain_config
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
    config = plain_config(family.denoiser.peft_config[ADAPTER_NAME]) | of_base
    return AdapterFiles(state, config, metadata or {}, type(family), family.naming_config)


def check_formats(family: ModelFamily, formats: Sequence[str]) -> None:
    """Check that the adapter in a family's denoiser can be written in some formats, before it is trained.

    Args:
        family: Family whose denoiser has the adapter.
        formats: Names of formats.

    Raises:
        UserError: If a format is not known or cannot hold the adapter.
    """
    model = family.denoiser
    state = get_peft_model_state_dict(
        model, model.state_dict(keep_vars=True), ADAPTER_NAME, save_embedding_layers=False
    )
    adapter = files_of(family, state)
    for one in map(format_named, formats):
        if reason := one.why_not(adapter):
            raise UserError(
                f"formats: the adapter cannot be written in the format {one.name}: {reason}; leave {one.name} out"
            )
