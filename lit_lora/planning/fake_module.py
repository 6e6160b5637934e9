"""Builds a module without weights, from tensors of the right size and dtype that take no memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from lit_lora.module import LoraDiffusion
from lit_lora.planning.known_calls import KnownCalls
from lit_lora.quantization import NF4
from lit_lora.quantization.base import Quantization, Stored

_MECHANISMS_OFF: dict[str, Any] = {
    "offload_encoders": False,
    "offload_blocks": False,
    "offload_folder": None,
    "offload_activations": False,
    "optimizer_in_backward": False,
}
"""Memory options that the simulation turns off and accounts for itself, since they would move tensors between devices."""


def make_mode() -> FakeTensorMode:
    """A mode for :func:`fake_tensors`."""
    return _FakeTensors(allow_non_fake_inputs=True)


@contextmanager
def fake_tensors(mode: FakeTensorMode | None = None) -> Iterator[None]:
    """A context in which new tensors have no contents, and modules of such tensors can be moved and cast.

    Args:
        mode: Mode of the tensors, since those of two modes cannot be used together; defaults to a new one.
    """
    original: Any = nn.Module._apply
    nn.Module._apply = _apply_by_replacing  # type: ignore[method-assign]
    # PEFT copies layers for modules_to_save; torch would copy contents, which do not exist.
    FakeTensor.__deepcopy__ = _deepcopy_by_cloning  # type: ignore[method-assign, assignment]
    try:
        with mode or make_mode():
            yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]
        del FakeTensor.__deepcopy__


class _FakeTensors(FakeTensorMode):
    """torch's mode, which looks up most operations in :class:`KnownCalls`.

    It would ask the driver again for each tensor whether there is a GPU: a tenth of the time of a plan.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: see :class:`~lit_lora.planning.storage_meter.StorageMeter`."""
        return False

    @cached_property
    def avoid_device_init(self) -> bool:
        return super().avoid_device_init

    @cached_property
    def _known(self) -> KnownCalls:
        return KnownCalls(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._known.call(func, types, args, kwargs or {})


def unloaded(module: LoraDiffusion) -> LoraDiffusion:
    """A copy of the module with the same options and nothing loaded; the module itself does not change."""
    with unset_fake_temporarily():
        return module.unloaded()


def build(
    module: LoraDiffusion, without: Collection[str], cuda: bool = False, denoiser: nn.Module | None = None
) -> LoraDiffusion:
    """A copy of the module with its parts built from fake tensors; call it inside :func:`fake_tensors`.

    Args:
        module: Module to copy; it does not change.
        without: Parts of the family that the run does not need: see :data:`lit_lora.families.parts.PARTS`.
        cuda: Whether the run is on a GPU, where one kernel dequantizes NF4 weights; defaults to False.
        denoiser: Denoiser with its adapter, of a module that was built from the same options of it and trains no text encoder;
            by default it is built too.

    Raises:
        UserError: If the module cannot be built: see :meth:`~lit_lora.LoraDiffusion.configure_model`.
    """
    fake = unloaded(module)
    fake.memory = replace(fake.memory, **_MECHANISMS_OFF)
    own: Any = fake
    own.quantization, own.family.text_quantization = copied = [
        copy.copy(one) for one in (own.quantization, own.family.text_quantization)
    ]
    for one in filter(None, copied):
        one.dequantize = _restored_at_once  # PEFT often reads weights here, but only their shape and dtype
    own.dispensable_parts = lambda: set(without)
    own.family.load = partial(own.family.load, weights=False)
    if denoiser is not None:
        own.family.denoiser = denoiser
        own._adapt = lambda *_: None
    # The values of the noise schedule are needed.
    own.objective.prepare = _with_real_tensors(own.objective.prepare)
    fake.configure_model()
    for one in filter(None, copied):
        if not (cuda and isinstance(one, NF4)):
            del one.dequantize
    return fake.train()


def planned_quantization(quantization: Quantization | None, cuda: bool) -> Quantization | None:
    """A copy of a quantization whose weights take the memory that they take on the device while they are dequantized.

    Args:
        quantization: Quantization of frozen weights; None for none.
        cuda: Whether the run is on a GPU, where one kernel dequantizes NF4 weights.
    """
    own = copy.copy(quantization)
    if cuda and isinstance(own, NF4):
        own.dequantize = _restored_at_once  # type: ignore[method-assign]
    return own


def _restored_at_once(stored: Stored, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A dequantized weight, without the intermediate tensors of dequantization."""
    return torch.empty(shape, dtype=dtype)


def _with_real_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args)

    return call


def _deepcopy_by_cloning(self: FakeTensor, memo: dict[int, Any]) -> Any:
    if id(self) not in memo:
        with torch.no_grad():
            clone = self.detach().clone()
        memo[id(self)] = nn.Parameter(clone, self.requires_grad) if isinstance(self, nn.Parameter) else clone
    return memo[id(self)]


def _apply_by_replacing(self: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """``Module._apply`` that creates new parameters; the original would replace the contents of the old ones."""
    for child in self.children() if recurse else ():
        child._apply(fn)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                applied = fn(parameter)
            if applied is not parameter:
                self._parameters[name] = nn.Parameter(applied.detach(), requires_grad=parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self
