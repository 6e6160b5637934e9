"""Adapters in a model whose weights come block by block and are sharded."""

from __future__ import annotations

import copy

from peft import PeftConfig, PeftType
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_lora.adapters.inject import check_trained_copy
from lit_lora.adapters.keys import adapter_keys
from lit_lora.distributed.collectives import broadcast
from lit_lora.errors import UserError

_BLOCK_BY_BLOCK = frozenset(
    {PeftType.LORA, PeftType.LOHA, PeftType.LOKR, PeftType.OFT, PeftType.IA3, PeftType.HRA, PeftType.VERA}
    | {PeftType.FOURIERFT, PeftType.ADALORA}
)
"""Methods whose adapters were compared with those that were put into a model with its weights."""


def same_adapter(module: nn.Module) -> None:
    """Give the adapter the first process's values; a collective call where there are several."""
    own = adapter_keys(module)
    state = {key: value for key, value in module.state_dict().items() if key in own and not _is_nan(value)}
    for key, value in broadcast(state).items():
        state[key].copy_(value)


def check_block_by_block(config: PeftConfig) -> None:
    """Make sure that an adapter can be put in before the base's weights are there.

    Raises:
        UserError: Its method is not known to begin without them, or shares trained tensors between layers.
    """
    if config.peft_type not in _BLOCK_BY_BLOCK:
        raise UserError(
            f"{type(config).__name__} is not known to train where the weights are shared out while they are read; use strategy "
            f"ddp, or one of {', '.join(sorted(kind.value for kind in _BLOCK_BY_BLOCK))}"
        )


def complete_adapter(module: nn.Module, config: PeftConfig) -> None:
    """Take from the base what the adapter begins with, where it was put in before the base's weights, which were nan, came.

    Args:
        module: All frozen weights in it are there by now.
        config: The adapter's.

    Raises:
        UserError: It is not known what the adapter's method takes.
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
                f"the adapter begins with values that it takes from the base's weights ({name}), which is not possible where "
                f"the weights are shared out while they are read; use strategy ddp"
            )


def _is_nan(value: Tensor) -> bool:
    """Whether there is a nan, in a tensor that is not shared out over processes."""
    return value.is_floating_point() and not isinstance(value, DTensor) and bool(value.isnan().any())
