"""The adapted models of one pipeline, and what their adapter methods need from training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Trainer
from peft import PeftConfig, PeftModel
from torch import Tensor

from lit_lora.adapters.inject import ADAPTER_NAME
from lit_lora.adapters.methods import AdapterMethod, method_of
from lit_lora.adapters.state import adapter_state, warn_of_left_out
from lit_lora.loops import number_of_steps


class AdaptedParts:
    """Calls the adapter method of each adapted model.

    Args:
        models: Adapted models by the names of the pipeline's parts, such as ``denoiser`` and ``text_encoder``.
    """

    def __init__(self, models: Mapping[str, PeftModel]) -> None:
        self.models = dict(models)

    def start(self, trainer: Trainer) -> None:
        """Tell methods with a schedule the number of optimizer steps, before training.

        Args:
            trainer: Trainer of a run that has begun.

        Raises:
            UserError: If the number of steps is unknown, or a schedule does not fit into it.
        """
        for _, model, config, method in self._all():
            if method.scheduled:
                method.start(model, number_of_steps(trainer, type(config).__name__))

    def penalty(self) -> Tensor | None:
        """Sum of the terms that are added to the loss, a float32 scalar; None if there is none."""
        terms = [term for _, model, _, method in self._all() if (term := method.penalty(model)) is not None]
        return sum(terms[1:], terms[0]) if terms else None

    def after_step(self, step: int) -> None:
        """Hook after each optimizer step: see :meth:`AdapterMethod.after_step`."""
        for _, model, _, method in self._all():
            method.after_step(model, step)

    def state(self) -> dict[str, dict[str, Any]]:
        """State of the methods for a checkpoint, by part."""
        return {name: method.state(model) for name, model, _, method in self._all()}

    def restore(self, states: Mapping[str, dict[str, Any]]) -> None:
        """Restore the methods' state, after the adapters' weights were restored.

        Args:
            states: Result of :meth:`state`; parts that it does not hold have no state.
        """
        for name, model, _, method in self._all():
            method.restore(model, states.get(name, {}))

    def state_bytes(self) -> int:
        """Bytes that :meth:`after_step` keeps on the device between steps."""
        return sum(method.state_bytes(model) for _, model, _, method in self._all())

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The adapters' full tensors on the CPU by part; a collective call where the strategy shards weights.

        A warning names what was trained in the models beside their adapters.
        """
        for model in self.models.values():
            warn_of_left_out(model)
        return {name: adapter_state(model) for name, model in self.models.items()}

    def _all(self) -> Iterator[tuple[str, PeftModel, PeftConfig, AdapterMethod]]:
        for name, model in self.models.items():
            config = model.peft_config[ADAPTER_NAME]
            yield name, model, config, method_of(config)
