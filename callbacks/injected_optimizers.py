"""Checks of the optimizers that a module makes for an adapter of which it does not know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lit_lora.distributed.optimizer_states import make_portable
from lit_lora.errors import UserError


def check_optimizers(made: Any, module: nn.Module) -> None:
    """Leave frozen parameters out of a module's optimizers, and check that the rest is all that is trained.

    The optimizers' states become portable: see :func:`~lit_lora.distributed.optimizer_states.make_portable`.

    Args:
        made: What the module's ``configure_optimizers`` has returned.
        module: Module with the adapter.

    Raises:
        UserError: If a trained parameter is in no optimizer, or an optimizer has frozen parameters alone.
    """
    trained = {id(parameter): name for name, parameter in module.named_parameters() if parameter.requires_grad}
    optimizers = list(_optimizers_in(made))
    for number, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            if "names" not in group:  # PEFT's LoRA-FA pairs names with parameters, and reads frozen ones
                # In place: some optimizers hold the list itself.
                for frozen in [parameter for parameter in group["params"] if not parameter.requires_grad]:
                    optimizer.state.pop(frozen, None)  # Adagrad makes its state at once
                group["params"][:] = [parameter for parameter in group["params"] if parameter.requires_grad]
        held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        if not held:
            raise UserError(
                f"optimizer {number} ({type(optimizer).__name__}) of {type(module).__name__} has frozen parameters alone, "
                f"{_WHY}; name what it trains in also_train of LoraInjection, or leave it out"
            )
        for identity in held:
            trained.pop(identity, None)
        make_portable(optimizer, module)
    if trained:
        raise UserError(
            f"{len(trained)} trained tensors are in no optimizer of {type(module).__name__}, the first is "
            f"{next(iter(trained.values()))}, {_WHY}; make the optimizer of self.parameters() inside configure_optimizers"
        )


_WHY = (
    "as where its parameters were listed in __init__, or by LightningCLI(auto_configure_optimizers=True), before the adapter was "
    "there"
)


def _optimizers_in(made: Any) -> Iterator[Optimizer]:
    """The optimizers in any form that ``configure_optimizers`` may return."""
    if isinstance(made, Optimizer):
        yield made
    elif isinstance(made, dict):
        yield from _optimizers_in(made.get("optimizer"))
    elif isinstance(made, list | tuple):
        for one in made:
            yield from _optimizers_in(one)
