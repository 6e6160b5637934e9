"""Keeps VAE and text encoders in host memory except while they encode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lit_lora.memory.host_weights import HostWeights, target_of


class EncoderOffload:
    """Keeps frozen models in host memory, and moves them to the device for the duration of a ``with`` block.

    ``to(device)`` of such a model, or of a model that contains it, only sets the device for these blocks, so the device does not
    hold the models while a run starts.

    For a GPU the host memory is page-locked. Nothing is copied back, because the models do not change.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._models: dict[nn.Module, HostWeights] = {}
        self._depth = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all models, in host memory at any time and also on the device inside :meth:`on_device`."""
        return sum(weights.nbytes for weights in self._models.values())

    def add(self, model: nn.Module) -> None:
        """Keep a model in host memory, where its tensors must be; adding a model twice has no effect."""
        if model in self._models:
            return
        assert self._depth == 0, "a model was added while models are in use"
        weights = HostWeights([*model.parameters(), *model.buffers()])
        if self.device.type == "cuda":
            weights.pin()
        self._models[model] = weights
        moved: Any = MethodType(_moves_nothing, model)
        model._apply = moved  # type: ignore[method-assign]
        model._encoder_offload = self  # type: ignore[assignment]

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """A context in which the models are on the device; it can be nested."""
        self._depth += 1
        try:
            for weights in self._models.values():
                weights.fetch(self.device)
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._drop()

    def moved_to(self, device: torch.device) -> None:
        """Set the device for :meth:`on_device`."""
        if device == self.device:
            return
        assert self._depth == 0, "the device was changed while the models are in use"
        self.device = device
        if device.type == "cuda":
            for weights in self._models.values():
                weights.pin()

    def _drop(self) -> None:
        for weights in self._models.values():
            weights.drop()


def _moves_nothing(model: Any, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """Replacement for ``nn.Module._apply`` that sets the device of the offload and moves nothing."""
    offload: EncoderOffload = model._encoder_offload
    offload.moved_to(target_of(convert, offload.device))
    return model
