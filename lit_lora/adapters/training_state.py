"""What belongs into a checkpoint beside the adapter: buffers that training changes, and layers that were unfrozen for a while."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lit_lora.adapters.keys import adapted_models, adapter_keys, parameters_without_compiling, without_compiling

_COPIED_BYTES = 1 << 24
"""Larger buffers of a frozen base, such as weights that another library has quantized, are compared by a hash."""


class TrainingState:
    """Keys of a module's ``state_dict()`` that a checkpoint of its training needs.

    These are the adapter's keys (:func:`adapter_keys`), parameters that were trainable at an earlier :meth:`note_trainable`,
    buffers outside the frozen base, and buffers of the frozen base that have changed since this object was made, such as the
    statistics of BatchNorm. The frozen base is every model that PEFT has adapted, and every other module whose parameters are
    all frozen.

    Args:
        module: The module as it is before training.
    """

    def __init__(self, module: nn.Module) -> None:
        self._seen: set[str] = set()
        self._trainable = _trainable(module)
        _, frozen = _persistent_buffers(module)
        self._before = {name: _fingerprint(buffer) for name, buffer in frozen.items()}

    def restored(self, keys: set[str]) -> None:
        """Note the keys of a checkpoint that was loaded: a checkpoint saved later holds them too."""
        self._seen |= keys

    def unfrozen(self, module: nn.Module) -> list[str]:
        """Names of the parameters that have become trainable since this object was made."""
        return sorted(_trainable(module) - self._trainable)

    def note_trainable(self, module: nn.Module) -> None:
        """Note what is trainable now: a checkpoint saved later holds it too, even if it is frozen again by then."""
        self._seen |= adapter_keys(module)

    def look(self, module: nn.Module) -> set[str]:
        """The keys that belong into a checkpoint now."""
        self.note_trainable(module)
        outside, frozen = _persistent_buffers(module)
        changed = {
            name
            for name, buffer in frozen.items()
            if name not in self._before or not torch.equal(self._before[name], _fingerprint(buffer))
        }
        return self._seen | outside.keys() | changed


def unfreeze(module: nn.Module, names: Iterable[str]) -> None:
    """Make parameters trainable.

    Args:
        module: The module.
        names: Result of :meth:`TrainingState.unfrozen` in an earlier run, in which other layers may have been compiled.
    """
    named = parameters_without_compiling(module)
    for name in names:
        named[without_compiling(name)].requires_grad_(True)


def _trainable(module: nn.Module) -> set[str]:
    return {name for name, parameter in parameters_without_compiling(module).items() if parameter.requires_grad}


def _persistent_buffers(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Buffers that ``state_dict()`` contains, by name: those outside the frozen base, and those in it."""
    outside: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    bases = tuple(f"{path}." if path else "" for path, _ in adapted_models(module))
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        if not prefix.startswith(bases) and _is_base(child):
            bases = (*bases, prefix)
        found = frozen if prefix.startswith(bases) else outside
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                found[prefix + name] = buffer
    return outside, frozen


def _is_base(module: nn.Module) -> bool:
    has_parameters = False
    for parameter in module.parameters():
        if parameter.requires_grad:
            return False
        has_parameters = True
    return has_parameters


def _fingerprint(buffer: Tensor) -> Tensor:
    """A copy on the CPU, or a hash of a large buffer."""
    buffer = buffer.detach()
    if buffer.nbytes <= _COPIED_BYTES:
        return buffer.to("cpu", copy=True)
    return torch.hash_tensor(buffer.contiguous().view(torch.uint8)).cpu()
