"""Checks of callbacks that set an adapter's first values: nothing that was loaded or set before may be lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_lora.adapters.ranked_layer import RankedLayer
from lit_lora.distributed.collectives import full_tensor
from lit_lora.errors import UserError


def check_no_start(module: Any, user: str) -> None:
    """Refuse an adapter whose values come from a file, before anything is loaded.

    Args:
        module: Module whose attribute ``saved``, if it has one, is the adapter that it goes on with.
        user: Name of the callback, for the error.

    Raises:
        UserError: If the module's adapter is :class:`~lit_lora.FromFile`.
    """
    if (saved := getattr(module, "saved", None)) is not None:
        raise UserError(
            f"{user} sets the first values of an adapter, and would replace those of {saved.path}, with which FromFile goes on; "
            f"remove {user} from trainer.callbacks, or give model.adapter a PEFT config"
        )


def check_untrained(layers: Sequence[RankedLayer], user: str) -> None:
    """Refuse layers that change the base's outputs already; under a strategy that shards weights a collective call.

    Args:
        layers: Layers before the first step.
        user: Name of the callback, for the error.

    Raises:
        UserError: If ``B`` of a layer is not zero.
    """
    for layer in layers:
        if full_tensor(layer.b).detach().any():
            raise UserError(
                f"{user} sets the first values of an adapter, and {layer.name} has values already, which would be lost: from a "
                f"file, or by init_lora_weights={layer.config.init_lora_weights!r}; leave that out, or remove {user} from "
                f"trainer.callbacks"
            )
