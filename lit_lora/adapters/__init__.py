"""The adapter: how it is put into a model and which keys are its own."""

from lit_lora.adapters.files import adapter_state, save_peft_files, sort_metadata
from lit_lora.adapters.inject import ADAPTER_NAME, inject, is_lora
from lit_lora.adapters.keys import (
    adapter_keys,
    check_adapter_config,
    check_adapter_state,
    keep_only_adapter,
    plain_config,
)
from lit_lora.adapters.sharded import check_block_by_block, complete_adapter, same_adapter

__all__ = [
    "ADAPTER_NAME",
    "adapter_keys",
    "adapter_state",
    "check_adapter_config",
    "check_adapter_state",
    "check_block_by_block",
    "complete_adapter",
    "inject",
    "is_lora",
    "keep_only_adapter",
    "plain_config",
    "same_adapter",
    "save_peft_files",
    "sort_metadata",
]
