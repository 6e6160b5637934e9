"""Changes of a model's weights while they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_lora.errors import UserError


@dataclass(frozen=True)
class WeightChange:
    """A change of one weight before it is quantized.

    Args:
        source: What makes the change, such as the path of an adapter, for errors.
        apply: Function from the weight in float32 to the changed weight, float32 of the same shape.
    """

    source: str
    apply: Callable[[Tensor], Tensor]


Changes = Mapping[str, WeightChange]
"""Changes by the names of weights."""


def check_changes(changes: Changes, names: set[str], model: nn.Module) -> None:
    """Check that a model has all weights that are to be changed.

    Args:
        changes: Changes of its weights.
        names: Names of all its weights.
        model: The model.

    Raises:
        UserError: If it lacks some.
    """
    missing = sorted(changes.keys() - names)
    if missing:
        raise UserError(
            f"{changes[missing[0]].source} changes {len(missing)} of {len(changes)} weights that {type(model).__name__} does not "
            f"have, the first is {missing[0]}; name an adapter of this base"
        )


@torch.no_grad()
def apply_changes(model: nn.Module, changes: Changes) -> None:
    """Change the weights of a loaded model, which keep their dtypes.

    Args:
        model: Model without quantized weights.
        changes: Changes of its weights.

    Raises:
        UserError: If the model lacks some of the weights, or they have other shapes.
    """
    parameters = dict(model.named_parameters())
    check_changes(changes, set(parameters), model)
    for name, change in changes.items():
        parameter = parameters[name]
        parameter.copy_(change.apply(parameter.float()))
