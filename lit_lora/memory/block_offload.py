"""Frozen weights of a denoiser in host memory, one block ahead of where they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_lora.blocks import outermost_blocks
from lit_lora.memory.host_weights import HostWeights, target_of
from lit_lora.quantization.frozen_layer import FrozenConv2d, FrozenLayer, FrozenLinear

_SMALLEST = 16 << 10
"""Bytes below which a tensor is not worth a copy each time: scales, tables."""


class BlockOffload:
    """Keeps the frozen weights of a model's blocks in host memory; at most two blocks have theirs on the device.

    A block's weights come when it is used, forward or backward, and meanwhile those of the block that is likely to be next:
    the one that was next the last time, for each kind of pass on its own; a backward pass starts with the reverse of the
    forward pass. A wrong guess costs time alone. Whatever reads a weight gets it on the device, from wherever it reads.

    ``to(device)`` of the model moves everything but these weights, and says where they go when they are used. So the device
    never holds all of them while a run starts.

    Args:
        model: With :class:`~lit_lora.quantization.frozen_layer.FrozenLayer`, in host memory; an adapter may be in it already.
        block_classes: Names of the classes of blocks. Of blocks inside each other the outermost counts.
        smallest_bytes: Smaller tensors go with the rest of the model.
    """

    def __init__(self, model: nn.Module, block_classes: Sequence[str], smallest_bytes: int = _SMALLEST) -> None:
        self.device = torch.device("cpu")
        self._stream: torch.cuda.Stream | None = None
        self._blocks: list[HostWeights] = []
        self._current: HostWeights | None = None
        self._passes: set[str] = set()
        self._after: dict[tuple[str, HostWeights], HostWeights] = {}
        for block in outermost_blocks(model, block_classes):
            self._take(block, smallest_bytes)

    @property
    def host_bytes(self) -> int:
        """Bytes of all the weights that wait in host memory."""
        return sum(block.nbytes for block in self._blocks)

    @property
    def device_bytes(self) -> int:
        """Bytes on the device at most: those of the two largest blocks."""
        return sum(sorted((block.nbytes for block in self._blocks), reverse=True)[:2])

    def release(self) -> None:
        """Let go of all copies on the device; the next use brings them back."""
        for block in self._blocks:
            block.drop()
        self._current = None
        self._passes = set()

    def moved_to(self, device: torch.device) -> None:
        """Use the weights on this device from now on."""
        self.release()
        if device == self.device:
            return
        self.device = device
        self._stream = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            for block in self._blocks:
                block.pin()

    def use(self, block: HostWeights, kind: str) -> None:
        """Have the block's weights on the device, and the next one's on the way.

        Args:
            block: The one that is about to compute.
            kind: Of pass.
        """
        if block is not self._current:
            self._learn(block)
            self._current, self._passes = block, set()
        elif kind in self._passes:
            return
        self._passes.add(kind)
        coming = self._after.get((kind, block))
        for other in self._blocks:
            if other is not block and other is not coming:
                other.drop()
        block.fetch(self.device, self._stream)
        block.wait()
        if coming is not None:
            coming.fetch(self.device, self._stream)

    def read(self, block: HostWeights) -> None:
        """Have the block's weights on the device for a layer that reads one."""
        if block is not self._current:
            self.use(block, _running_pass())

    def _learn(self, block: HostWeights) -> None:
        """Keep in mind that the block comes after the current one."""
        if self._current is None:
            return
        for kind in self._passes:
            self._after[kind, self._current] = block
        if "forward" in self._passes:
            for kind in ("backward", "recomputation"):
                self._after.setdefault((kind, block), self._current)

    def _take(self, block: nn.Module, smallest_bytes: int) -> None:
        layers = {
            layer: names
            for layer in block.modules()
            if type(layer) in _OFFLOADED and (names := list(_large(layer, smallest_bytes)))
        }
        if not layers:
            return
        weights = HostWeights(layer._parameters[name] for layer, names in layers.items() for name in names)  # type: ignore[misc]
        self._blocks.append(weights)
        for layer, names in layers.items():
            layer.__class__ = _OFFLOADED[type(layer)]
            assert isinstance(layer, _OffloadedLayer)
            layer.offload, layer.block, layer.host_names = self, weights, frozenset(names)
        block.register_forward_pre_hook(lambda *_: self.use(weights, _running_pass()))
        block.register_forward_hook(lambda _module, _inputs, output: self._watch_backward(weights, output))

    def _watch_backward(self, block: HostWeights, output: Any) -> None:
        """The block's backward pass begins when the gradient of its output is there."""
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(self._begin_backward, block))

    def _begin_backward(self, block: HostWeights, _grad: Tensor) -> None:
        self.use(block, "backward")


class _OffloadedLayer(FrozenLayer):
    """A frozen layer whose stored tensors are where :class:`BlockOffload` has them."""

    offload: BlockOffload | None = None
    """None in a layer that PEFT has made of the same class."""
    block: HostWeights
    host_names: frozenset[str] = frozenset()

    @property
    def weight(self) -> Tensor:
        self._bring()
        return super().weight

    def restored(self, dtype: torch.dtype) -> Tensor:
        self._bring()
        return super().restored(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.offload is not None:
            self.offload.moved_to(target_of(fn, self.offload.device))
        parameters = dict(self._parameters)
        for name in self.host_names:
            del self._parameters[name]
        try:
            super()._apply(fn, recurse)
        finally:
            # In the order that they had, which is that of the state_dict.
            moved = dict(self._parameters)
            self._parameters.clear()
            self._parameters.update(parameters | moved)
        return self

    def _bring(self) -> None:
        if self.offload is not None:
            self.offload.read(self.block)


class _OffloadedLinear(_OffloadedLayer, FrozenLinear):  # type: ignore[override]
    pass


class _OffloadedConv2d(_OffloadedLayer, FrozenConv2d):  # type: ignore[override]
    pass


_OFFLOADED: dict[type[nn.Module], type[_OffloadedLayer]] = {
    FrozenLinear: _OffloadedLinear,
    FrozenConv2d: _OffloadedConv2d,
}


def _large(layer: nn.Module, smallest_bytes: int) -> Iterator[str]:
    """The stored tensors that are worth it; one that is trained, as a copy in PEFT's ``modules_to_save``, is not frozen."""
    # Where PEFT adapts a convolution, it makes layers of the same class, which store nothing.
    for name in getattr(layer, "stored_names", ()):
        parameter = layer._parameters[name]
        if parameter is not None and not parameter.requires_grad and parameter.nbytes >= smallest_bytes:
            yield name


def _running_pass() -> str:
    """The kind of pass that a forward call belongs to."""
    if torch._C._current_graph_task_id() != -1:
        return "recomputation"
    return "forward" if torch.is_grad_enabled() else "inference"
