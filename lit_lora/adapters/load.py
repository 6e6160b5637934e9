"""Puts an adapter that was read from files into a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor, nn

from lit_lora.adapters.bounds import check_bounds
from lit_lora.adapters.inject import ADAPTER_NAME
from lit_lora.errors import UserError


def load_adapter(model: nn.Module, config: Mapping[str, Any], state: Mapping[str, Tensor], path: object) -> PeftModel:
    """Put a trained adapter into a model, in place.

    Args:
        model: Model to adapt.
        config: Plain config of the adapter.
        state: Tensors of the adapter under PEFT's names.
        path: File of the adapter, for errors.

    Raises:
        UserError: If the adapter does not fit the model, or tensors are missing or unknown.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
            kind = PeftConfig.from_peft_type(**{**config, "inference_mode": True})
            check_bounds(kind, model)
            adapted = PeftModel(model, kind, ADAPTER_NAME)
            set_peft_model_state_dict(adapted, dict(state), ADAPTER_NAME)
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines()[:2]
        raise UserError(
            f"the adapter {path} does not fit {type(model).__name__}: {' '.join(reason) or type(error).__name__}; set "
            f"--base to the base that it was trained on"
        ) from error
    expected = get_peft_model_state_dict(adapted, adapter_name=ADAPTER_NAME, save_embedding_layers=False).keys()
    for what, names in (("misses", expected - state.keys()), ("has unknown", state.keys() - expected)):
        if names:
            raise UserError(
                f"the adapter {path} {what} {len(names)} tensors, the first is {min(names)}; its file is incomplete or of "
                f"another adapter than its config"
            )
    return adapted
