"""Tensors of an adapter."""

from __future__ import annotations

from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor

from lit_lora.adapters.inject import ADAPTER_NAME
from lit_lora.distributed.collectives import full_tensor


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's own tensors, which may be sharded, under PEFT's names without the adapter's name."""
    state: dict[str, Tensor] = get_peft_model_state_dict(
        model, model.state_dict(keep_vars=True), ADAPTER_NAME, save_embedding_layers=False
    )
    return state


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's full tensors on the CPU, under PEFT's names without the adapter's name.

    A collective call where the strategy shards weights: every process has to make it.
    """
    return {key: full_tensor(value).detach().cpu().contiguous() for key, value in adapter_tensors(model).items()}
