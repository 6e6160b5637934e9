"""Adapters in a model whose weights are loaded block by block and sharded."""

from __future__ import annotations

import copy

from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_lora.adapters.inject import check_trained_copy
from lit_lora.adapters.keys import adapter_keys
from lit_lora.adapters.methods import BLOCK_BY_BLOCK, method_of
from lit_lora.distributed import is_ours
from lit_lora.distributed.collectives import broadcast
from lit_lora.errors import UserError


def same_adapter(module: nn.Module) -> None:
    """Set the adapter to the first process's values; a collective call where there are several processes."""
    own = adapter_keys(module)
    state = {key: value for key, value in module.state_dict().items() if key in own and not _is_nan(value)}
    for key, value in broadcast(state).items():
        state[key].copy_(value)


def check_block_by_block(config: PeftConfig) -> None:
    """Check that an adapter can be put in before the weights of the base are there.

    Args:
        config: PEFT config of the adapter.

    Raises:
        UserError: If it is not known whether the method's initial values depend on the base's weights, or whether its layers
            share trained tensors.
    """
    if not method_of(config).block_by_block:
        raise UserError(
            f"{type(config).__name__} is not known to train where the weights are sharded while they are read; use strategy "
            f"ddp, or one of {', '.join(kind.__name__ for kind in BLOCK_BY_BLOCK)}"
        )


def check_sharded_training(config: PeftConfig, strategy: object) -> None:
    """Check that a strategy leaves each process what the adapter's method reads.

    Args:
        config: PEFT config of the adapter.
        strategy: Strategy of the trainer.

    Raises:
        UserError: If the strategy shards weights, gradients or optimizer states, and the method needs full ones.
    """
    method = method_of(config)
    if is_ours(strategy) and (method.whole_gradients or not method.elementwise):
        raise UserError(
            f"{type(config).__name__} trains with full tensors and gradients, and {type(strategy).__name__} leaves each process "
            f"a part of them; use strategy ddp, or peft.LoraConfig"
        )


def complete_adapter(module: nn.Module, config: PeftConfig) -> None:
    """Initialize what an adapter takes from the base, after it was injected into a model with nan for weights.

    These are DoRA's magnitudes and trained copies of layers.

    Args:
        module: Part of the model whose frozen weights are all loaded.
        config: PEFT config of the adapter.

    Raises:
        UserError: If other tensors of the adapter are still nan.
    """
    for path, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            for name in layer.lora_magnitude_vector:
                if _is_nan(layer.lora_magnitude_vector[name].weight):
                    layer.lora_variant[name].init(layer, name, config=config)
                    magnitude = layer.lora_magnitude_vector[name].weight
                    magnitude.data = magnitude.data.float()
        elif isinstance(layer, ModulesToSaveWrapper):
            for name, copied in layer.modules_to_save.items():
                if any(map(_is_nan, copied.parameters())):
                    check_trained_copy(path, layer.original_module)
                    layer.modules_to_save[name] = copy.deepcopy(layer.original_module).float().requires_grad_(True)
    own = adapter_keys(module)
    for name, value in module.state_dict(keep_vars=True).items():
        if name in own and _is_nan(value):
            raise UserError(
                f"the adapter takes initial values from the base's weights ({name}), which is not possible where the weights "
                f"are sharded while they are read; use strategy ddp"
            )


def _is_nan(value: Tensor) -> bool:
    """Whether a tensor that is not sharded contains nan."""
    return value.is_floating_point() and not isinstance(value, DTensor) and bool(value.isnan().any())
