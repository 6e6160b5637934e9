"""Keeps frozen weights of a denoiser in host memory and fetches them one block ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_lora.blocks import found_blocks
from lit_lora.mapped import is_mapped, keep_in_memory, keep_on_disk
from lit_lora.memory.host_weights import TRAINING_ADVICE, HostWeights, target_of
from lit_lora.memory.mapped_weights import FileReader, MappedWeights
from lit_lora.quantization.base import Stored
from lit_lora.quantization.frozen_layer import FrozenConv2d, FrozenLayer, FrozenLinear

_SMALLEST = 16 << 10
"""Smallest tensor, in bytes, that is worth repeated copies; scales and tables of quantized layers are smaller."""


class BlockOffload:
    """Keeps the frozen weights of a model's blocks in host memory, except those of at most two blocks on the device.

    The weights of a block are fetched when a forward or backward pass uses it, while those of the next block are prefetched. The
    next block is the one that followed the last time in the same kind of pass; in the first backward pass it is the previous
    block of the forward pass. A wrong guess only costs time. Code that reads a weight always gets it on the device.

    ``to(device)`` of the model moves everything except these weights and sets the device to which they are fetched, so the
    device never holds all of them, not even while a run starts.

    Args:
        model: Model with :class:`~lit_lora.quantization.frozen_layer.FrozenLayer` layers in host memory, with or without an
            adapter.
        block_classes: Class names of the blocks; of nested blocks only the outermost count.
        smallest_bytes: Smallest tensor, in bytes, that is kept in host memory; defaults to 16 KiB. Smaller ones move with the
            rest of the model.
        folder: Folder for files in which large weights are kept instead of host memory; those that are mapped from files
            already stay there. Defaults to none.
        advice: What the user can do if the system cannot lock enough host memory. Defaults to options of training.

    Raises:
        UserError: If the model has no such block, or the folder cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        block_classes: Sequence[str],
        smallest_bytes: int = _SMALLEST,
        folder: str | Path | None = None,
        advice: str = TRAINING_ADVICE,
    ) -> None:
        self._advice = advice
        self._keep = keep_in_memory if folder is None else keep_on_disk(Path(folder))
        self.device = torch.device("cpu")
        self._stream: torch.cuda.Stream | None = None
        self._blocks: list[HostWeights] = []
        self._current: HostWeights | None = None
        self._passes: set[str] = set()
        self._after: dict[tuple[str, HostWeights], HostWeights] = {}
        for block in found_blocks(model, block_classes, "memory.offload_blocks"):
            self._take(block, smallest_bytes)
        self._make_reader()

    @property
    def host_bytes(self) -> int:
        """Bytes of all weights kept in host memory."""
        return sum(block.nbytes for block in self._blocks)

    @property
    def device_bytes(self) -> int:
        """Largest number of bytes on the device: the weights of the two largest blocks."""
        return sum(sorted((block.nbytes for block in self._blocks), reverse=True)[:2])

    def release(self) -> None:
        """Free all copies on the device; the next use fetches them again."""
        for block in self._blocks:
            block.drop()
        self._current = None
        self._passes = set()

    def moved_to(self, device: torch.device) -> None:
        """Set the device to which weights are fetched."""
        self.release()
        if device == self.device:
            return
        self.device = device
        self._stream = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            for block in self._blocks:
                block.pin(self._advice)
        self._make_reader()

    def use(self, block: HostWeights, kind: str) -> None:
        """Fetch the weights of a block, and begin to fetch those of the block that is expected next.

        Args:
            block: Weights of the block that is about to compute.
            kind: Kind of the pass, such as ``forward`` or ``backward``.
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
        """Fetch the weights of a block for a layer that reads one of them."""
        if block is not self._current:
            self.use(block, _running_pass())

    def _learn(self, block: HostWeights) -> None:
        """Remember that this block followed the current one."""
        if self._current is None:
            return
        for kind in self._passes:
            self._after[kind, self._current] = block
        if "forward" in self._passes:
            for kind in ("backward", "recomputation"):
                self._after.setdefault((kind, block), self._current)

    def _make_reader(self) -> None:
        """Give the blocks that are mapped from files a reader for the present device."""
        mapped = [block for block in self._blocks if isinstance(block, MappedWeights)]
        if mapped:
            reader = FileReader(self.device, self._stream, max(block.staged_bytes for block in mapped))
            for block in mapped:
                block.reader = reader

    def _take(self, block: nn.Module, smallest_bytes: int) -> None:
        layers = {
            layer: names
            for layer in block.modules()
            if type(layer) in _OFFLOADED and (names := list(_large(layer, smallest_bytes)))
        }
        if not layers:
            return
        tensors = [layer.get_parameter(name) for layer, names in layers.items() for name in names]
        for tensor in tensors:
            if not is_mapped(tensor):
                tensor.data = self._keep(tensor.data)
        weights = (MappedWeights if any(map(is_mapped, tensors)) else HostWeights)(tensors)
        self._blocks.append(weights)
        for layer, names in layers.items():
            layer.__class__ = _OFFLOADED[type(layer)]
            assert isinstance(layer, _OffloadedLayer)
            layer.offload, layer.block, layer.host_names = self, weights, frozenset(names)
        block.register_forward_pre_hook(lambda *_: self.use(weights, _running_pass()))
        block.register_forward_hook(lambda _module, _inputs, output: self._watch_backward(weights, output))

    def _watch_backward(self, block: HostWeights, output: Any) -> None:
        """Fetch the block's weights when the gradient of its output is computed, as its backward pass begins."""
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(self._begin_backward, block))

    def _begin_backward(self, block: HostWeights, _grad: Tensor) -> None:
        self.use(block, "backward")


class _OffloadedLayer(FrozenLayer):
    """A frozen layer whose stored tensors :class:`BlockOffload` fetches before they are read."""

    offload: BlockOffload | None = None
    """None in a layer that PEFT created from this class."""
    block: HostWeights
    host_names: frozenset[str] = frozenset()

    @property
    def weight(self) -> Tensor:
        self._bring()
        return super().weight

    def stored(self) -> Stored:
        self._bring()
        return super().stored()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.offload is not None:
            self.offload.moved_to(target_of(fn, self.offload.device))
        parameters = dict(self._parameters)
        for name in self.host_names:
            del self._parameters[name]
        try:
            super()._apply(fn, recurse)
        finally:
            # Restore the order of the parameters, which is that of the state_dict.
            moved = dict(self._parameters)
            self._parameters.clear()
            self._parameters.update(parameters | moved)
        return self

    def _bring(self) -> None:
        if self.offload is not None:
            self.offload.read(self.block)


class _OffloadedLinear(_OffloadedLayer, FrozenLinear):  # type: ignore[override]
    stays = False


class _OffloadedConv2d(_OffloadedLayer, FrozenConv2d):  # type: ignore[override]
    pass


_OFFLOADED: dict[type[nn.Module], type[_OffloadedLayer]] = {
    FrozenLinear: _OffloadedLinear,
    FrozenConv2d: _OffloadedConv2d,
}


def _large(layer: nn.Module, smallest_bytes: int) -> Iterator[str]:
    """Names of the stored tensors that are large enough to move; trained copies in PEFT's ``modules_to_save`` stay."""
    # PEFT adapts a convolution with layers of the same class, which store nothing.
    for name in getattr(layer, "stored_names", ()):
        parameter = layer._parameters[name]
        if parameter is not None and not parameter.requires_grad and parameter.nbytes >= smallest_bytes:
            yield name


def _running_pass() -> str:
    """Kind of the pass that the current forward call belongs to."""
    if torch._C._current_graph_task_id() != -1:
        return "recomputation"
    return "forward" if torch.is_grad_enabled() else "inference"
