"""Puts an adapter that was read from files into a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from torch import Tensor, nn

from lit_lora.adapters.bounds import check_bounds
from lit_lora.adapters.inject import ADAPTER_NAME
from lit_lora.adapters.state import adapter_tensors
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
        kind = PeftConfig.from_peft_type(**{**config, "inference_mode": True})
        check_bounds(kind, model)
        with warnings.catch_warnings():
            # PEFT reads this attribute of transformers' models.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            adapted = PeftModel(model, kind, ADAPTER_NAME)
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise _misfit(path, model, error) from error
    set_adapter_state(adapted, state, path)
    return adapted


def set_adapter_state(model: PeftModel, state: Mapping[str, Tensor], path: object) -> None:
    """Set the values of an adapter.

    Args:
        model: Model with the adapter.
        state: Tensors of the adapter under PEFT's names.
        path: File of the adapter, for errors.

    Raises:
        UserError: If tensors are missing, unknown or of other shapes.
    """
    try:
        set_peft_model_state_dict(model, dict(state), ADAPTER_NAME)
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise _misfit(path, model.get_base_model(), error) from error
    expected = adapter_tensors(model).keys()
    for what, names in (("misses", expected - state.keys()), ("has unknown", state.keys() - expected)):
        if names:
            raise UserError(
                f"the adapter {path} {what} {len(names)} tensors, the first is {min(names)}; its file is incomplete or of "
                f"another adapter than its config"
            )


def _misfit(path: object, model: nn.Module, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[:2]
    return UserError(
        f"the adapter {path} does not fit {type(model).__name__}: {' '.join(reason) or type(error).__name__}; use the base that "
        f"it was trained on"
    )
