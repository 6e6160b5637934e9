"""What an adapter method asks of training beyond steps of the optimizer."""

from __future__ import annotations

from typing import Any, ClassVar

from peft import PeftModel


class AdapterMethod:
    """An adapter method that needs nothing but steps of the optimizer; others override what they need.

    The training loop, the planner and the checks of strategies ask these questions, so none of them knows a method by name.
    """

    whole_gradients: ClassVar[bool] = False
    """Whether :meth:`after_step` reads the gradients of all parameters, which must then neither be freed nor sharded."""
    elementwise: ClassVar[bool] = True
    """Whether training treats each element by itself, so that a process may hold pieces of the adapter's tensors."""
    block_by_block: ClassVar[bool] = False
    """Whether the adapter can be put into a model before the weights of the base are there.

    Its initial values then depend on no weight of the base, and its layers share no trained tensor. True only for methods
    that were compared with an adapter put into a model that has its weights.
    """
    rank_field: ClassVar[str | None] = "r"
    """Field of the config that alone sets the adapter's rank; None if there is no such field."""

    def after_step(self, model: PeftModel, step: int) -> None:
        """Called after each step of the optimizer, before the gradients are freed.

        Args:
            model: The adapted model.
            step: Number of the optimizer step just done, from 1.
        """

    def state(self, model: PeftModel) -> dict[str, Any]:
        """What :meth:`after_step` keeps between steps, in the types of a checkpoint; empty by default."""
        return {}

    def restore(self, model: PeftModel, state: dict[str, Any]) -> None:
        """Continue from :meth:`state`, with the adapter's weights restored already.

        Args:
            model: The adapted model.
            state: What :meth:`state` returned; empty for a checkpoint without it.
        """

    def state_bytes(self, model: PeftModel) -> int:
        """Bytes that :meth:`after_step` keeps on the device between steps; 0 by default."""
        return 0
