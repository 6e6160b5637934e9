"""Adapters: injection into a model, keys, methods, and sharded models."""

from lit_lora.adapters.adapted_parts import AdaptedParts
from lit_lora.adapters.inject import ADAPTER_NAME, inject
from lit_lora.adapters.keys import (
    adapter_configs,
    adapter_keys,
    check_adapter_state,
    check_finite,
    check_loaded,
    keep_only_adapter,
    parameters_without_compiling,
    plain_config,
    without_compiling,
)
from lit_lora.adapters.load import load_adapter, set_adapter_state
from lit_lora.adapters.methods import AdapterMethod, method_of
from lit_lora.adapters.same_config import check_adapter_config, check_saved_configs
from lit_lora.adapters.sharded import check_block_by_block, check_sharded_training, complete_adapter, same_adapter
from lit_lora.adapters.state import adapter_state
from lit_lora.adapters.training_state import TrainingState, unfreeze

__all__ = [
    "ADAPTER_NAME",
    "AdaptedParts",
    "AdapterMethod",
    "TrainingState",
    "adapter_configs",
    "adapter_keys",
    "adapter_state",
    "check_adapter_config",
    "check_adapter_state",
    "check_block_by_block",
    "check_finite",
    "check_loaded",
    "check_saved_configs",
    "check_sharded_training",
    "complete_adapter",
    "inject",
    "keep_only_adapter",
    "load_adapter",
    "method_of",
    "parameters_without_compiling",
    "plain_config",
    "same_adapter",
    "set_adapter_state",
    "unfreeze",
    "without_compiling",
]
