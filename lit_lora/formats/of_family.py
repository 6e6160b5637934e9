"""The contents of the files for the adapters in a loaded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lit_lora.adapters import ADAPTER_NAME, method_of, plain_config
from lit_lora.adapters.state import adapter_tensors
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily
from lit_lora.formats import format_named, marker_of
from lit_lora.formats.base import AdapterFiles
from lit_lora.formats.base_options import options_metadata
from lit_lora.formats.text_encoders import normalized


def files_of(
    family: ModelFamily,
    tensors: Mapping[str, Mapping[str, Tensor]],
    new_tokens: Mapping[str, Mapping[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> AdapterFiles:
    """The contents of the files for the adapters in a family's denoiser and text encoders.

    Args:
        family: Family whose parts have adapters.
        tensors: Tensors of the adapters by part: see :meth:`lit_lora.adapters.AdaptedParts.tensors`.
        new_tokens: Embeddings of new tokens: see :meth:`ModelFamily.new_token_rows`.
        metadata: What is known about the training; defaults to nothing.
    """
    parts = {name: _part(family, name, state) for name, state in tensors.items()}
    denoiser = parts.pop("denoiser", AdapterFiles({}, _base_entries(family)))
    return AdapterFiles(
        denoiser.state,
        denoiser.config,
        {**(metadata or {}), **options_metadata(family)},
        type(family),
        family.naming_config,
        {name: normalized(part) for name, part in parts.items()},
        new_tokens,
    )


def _part(family: ModelFamily, name: str, state: Mapping[str, Tensor]) -> AdapterFiles:
    model = family.adapted.models[name]
    kind = family.denoiser_class if name == "denoiser" else type(model.get_base_model())
    # PEFT's save_pretrained names the adapted model in the same way.
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    of_base = {**_base_entries(family), "auto_mapping": mapping}
    trained = model.peft_config[ADAPTER_NAME]
    return AdapterFiles(*method_of(trained).export(model, state, plain_config(trained) | of_base))


def _base_entries(family: ModelFamily) -> dict[str, str]:
    """What a PEFT config says about the base."""
    revision = {"revision": family.source.revision} if family.source.revision else {}
    return {"base_model_name_or_path": family.pretrained_model_name_or_path, **revision}


def _no_rows(family: ModelFamily) -> dict[str, Mapping[str, Tensor]]:
    """The new tokens without their embeddings, which are not looked at."""
    return {token: {} for token in family.new_tokens}


def check_formats(family: ModelFamily, formats: Sequence[str]) -> None:
    """Check that the adapters in a family's parts can be written in some formats, before it is trained.

    Args:
        family: Family whose parts have adapters.
        formats: Names of formats.

    Raises:
        UserError: If a format is not known or cannot hold the adapter, or no format can.
    """
    adapter = files_of(
        family, {name: adapter_tensors(model) for name, model in family.adapted.models.items()}, _no_rows(family)
    )
    marker_of(adapter)
    for one in map(format_named, formats):
        if reason := one.why_not(adapter):
            raise UserError(
                f"formats: the adapter cannot be written in the format {one.name}: {reason}; leave {one.name} out"
            )
