"""The interface of an adapter method: what it needs from training beyond optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from peft import PeftConfig, PeftModel
from torch import Tensor, nn


class AdapterMethod:
    """An adapter method that needs only optimizer steps; methods that need more are subclasses.

    The training loop, the planner and the checks of strategies use this interface, so none of them knows a method by name.
    """

    whole_gradients: ClassVar[bool] = False
    """Whether :meth:`after_step` reads the gradients of all parameters, which then must not be freed or sharded."""
    elementwise: ClassVar[bool] = True
    """Whether training treats each element independently, so that the adapter's tensors can be sharded."""
    block_by_block: ClassVar[bool] = False
    """Whether the adapter can be injected into a model before the base's weights are loaded.

    This requires that its initial values depend on no weight of the base and that its layers share no trained tensor. Only
    methods that were compared with an adapter in a loaded model set it to True.
    """
    scheduled: ClassVar[bool] = False
    """Whether :meth:`start` needs the number of optimizer steps."""
    schedule_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields of the config that only a schedule of the training depends on, so that a resumed run may change them."""
    rank_field: ClassVar[str | None] = "r"
    """Field of the config that sets the adapter's rank by itself; None if there is no such field."""

    def check(self, model: nn.Module, config: PeftConfig) -> None:
        """Check a model before an adapter is injected; does nothing by default.

        Args:
            model: Model with the base's weights.
            config: Config of the adapter.

        Raises:
            UserError: If the method cannot adapt the model.
        """

    def injected(self, model: PeftModel) -> None:
        """Hook after the adapter was injected, in all processes; does nothing by default.

        Args:
            model: Adapted model.
        """

    def start(self, model: PeftModel, steps: int) -> None:
        """Hook before training, called if the method is :attr:`scheduled`; does nothing by default.

        Args:
            model: Adapted model.
            steps: Number of optimizer steps of the whole training.

        Raises:
            UserError: If the method's schedule does not fit into the steps.
        """

    def penalty(self, model: PeftModel) -> Tensor | None:
        """Term that is added to the loss, a float32 scalar; None by default.

        Args:
            model: Adapted model.
        """
        return None

    def export(
        self, model: PeftModel, state: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """The adapter as its files hold it, for the base as it was before training; unchanged by default.

        Args:
            model: Adapted model.
            state: Full tensors of the adapter, under PEFT's names without the adapter's name.
            config: Config of the adapter in JSON's types.
        """
        return state, config

    def planned(
        self, model: PeftModel, state: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Tensors of the shapes that :meth:`export` gives after training; their values mean nothing.

        Args:
            model: Adapted model, whose tensors may have no values.
            state: Tensors of the adapter, under PEFT's names without the adapter's name.
            config: Config of the adapter in JSON's types.
        """
        return self.export(model, state, config)

    def after_step(self, model: PeftModel, step: int) -> None:
        """Hook after each optimizer step, before the gradients are freed; does nothing by default.

        Args:
            model: Adapted model.
            step: Number of the completed optimizer step, from 1.
        """

    def state(self, model: PeftModel) -> dict[str, Any]:
        """State that :meth:`after_step` keeps between steps, in types that a checkpoint can hold; empty by default.

        Args:
            model: Adapted model.
        """
        return {}

    def restore(self, model: PeftModel, state: dict[str, Any]) -> None:
        """Restore the state, after the adapter's weights were restored.

        Args:
            model: Adapted model.
            state: Result of :meth:`state`; empty for a checkpoint without it.
        """

    def state_bytes(self, model: PeftModel) -> int:
        """Bytes that :meth:`after_step` keeps on the device between steps; 0 by default.

        Args:
            model: Adapted model.
        """
        return 0
