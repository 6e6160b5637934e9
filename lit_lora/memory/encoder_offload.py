"""VAE and text encoders that wait in host memory until they encode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lit_lora.memory.host_weights import HostWeights, target_of


class EncoderOffload:
    """Keeps frozen models in host memory; they come to the device for a block of code.

    ``to(device)`` of a model, or of one that it is a part of, moves nothing any more: it says where the model goes for such a
    block. So the device never holds all of them while a run starts.

    On a GPU the host memory is locked. Going back to it costs nothing, as the models do not change.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._models: dict[nn.Module, HostWeights] = {}
        self._depth = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all the models: of host memory at any time, and of the device's inside a block."""
        return sum(weights.nbytes for weights in self._models.values())

    def add(self, model: nn.Module) -> None:
        """Keep this model, whose tensors are in host memory now; one that is kept already stays so."""
        if model in self._models:
            return
        assert self._depth == 0, "models are added while none is in use"
        weights = HostWeights([*model.parameters(), *model.buffers()])
        if self.device.type == "cuda":
            weights.pin()
        self._models[model] = weights
        moved: Any = MethodType(_moves_nothing, model)
        model._apply = moved  # type: ignore[method-assign]
        model._encoder_offload = self  # type: ignore[assignment]

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside the block the models are on the device; blocks may lie inside each other."""
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
        """Use this device from now on."""
        if device == self.device:
            return
        assert self._depth == 0, "the device changes while the models are in use"
        self.device = device
        if device.type == "cuda":
            for weights in self._models.values():
                weights.pin()

    def _drop(self) -> None:
        for weights in self._models.values():
            weights.drop()


def _moves_nothing(model: Any, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """Stands in for ``nn.Module._apply``, through which a module is moved."""
    offload: EncoderOffload = model._encoder_offload
    offload.moved_to(target_of(convert, offload.device))
    return model
