"""Changes of a model's weights while they are loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lit_lora.errors import UserError

COARSE = 0.1
"""Error of a change by rounding, as a share of it, from which on it is told."""


@dataclass
class Rounding:
    """What narrow dtypes leave of changes of weights.

    Args:
        changes: Sum of the squares of all changes in dtypes narrower than float32.
        errors: Sum of the squares of what rounding adds to these changes.
    """

    changes: float = 0.0
    errors: float = 0.0

    @property
    def share(self) -> float:
        """Norm of the errors by that of the changes."""
        return math.sqrt(self.errors / self.changes) if self.changes else 0.0

    def add(self, old: Tensor, new: Tensor, stored: Tensor) -> None:
        """Count a tensor, unless it is stored as exactly as it is computed.

        Args:
            old: Its value before.
            new: Its changed value, float32.
            stored: The changed value in the dtype in which it is kept.
        """
        if stored.dtype.itemsize < new.dtype.itemsize:
            self.changes += float(torch.linalg.vector_norm(new - old).double() ** 2)
            self.errors += float(torch.linalg.vector_norm(new - stored).double() ** 2)


@dataclass(frozen=True)
class WeightChange:
    """A change of one weight before it is quantized.

    Args:
        source: What makes the change, such as the path of an adapter, for errors.
        apply: Function from the weight in float32 to the changed weight, float32 of the same shape.
        rounding: Where the rounding of changed weights is counted; defaults to an own one.
    """

    source: str
    apply: Callable[[Tensor], Tensor]
    rounding: Rounding = field(default_factory=Rounding)

    def applied(self, weight: Tensor, stored_in: torch.dtype | None = None) -> Tensor:
        """The changed weight, float32.

        Args:
            weight: The weight in any dtype.
            stored_in: dtype in which the changed weight is kept, whose rounding is counted; None counts nothing.
        """
        new = self.apply(weight.float())
        if stored_in is not None:
            self.rounding.add(weight, new, new.to(stored_in))
        return new


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
        parameter.copy_(change.applied(parameter, parameter.dtype))
