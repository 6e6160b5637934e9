"""Keeps models in host memory except the one that computes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from lit_lora.memory.host_weights import HostWeights


class OneOnDevice:
    """Keeps frozen models in host memory, with copies on a device of those that are in use.

    Args:
        models: Models in host memory by name.
        device: Device that computes.
    """

    def __init__(self, models: Mapping[str, nn.Module], device: torch.device) -> None:
        self._device = device
        self._weights = {name: HostWeights([*one.parameters(), *one.buffers()]) for name, one in models.items()}

    @property
    def on_device(self) -> dict[str, int]:
        """Bytes of the models on the device by name."""
        return {name: weights.nbytes for name, weights in self._weights.items() if weights.is_on_device}

    def bring(self, names: Collection[str]) -> None:
        """Free the copies of all other models, then bring some to the device.

        Args:
            names: Names of the models that compute next.
        """
        for name, weights in self._weights.items():
            if name not in names:
                weights.drop()
        for name in names:
            self._weights[name].fetch(self._device)
