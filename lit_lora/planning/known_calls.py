"""Operations on tensors without contents whose outcome is known from an earlier call with the same metadata.

A model consists of many equal blocks, and a plan runs each of them several times, so that nearly every operation has been
called before with arguments of the same shapes. torch's own cache of such calls takes five times as long to look one up.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

DEVICE_OF = torch.ops.prim.device.default
"""Operation that asks for a tensor's device; torch calls it twice for each other operation on tensors without contents."""

_CPU = torch.device("cpu")
_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)
"""Tags of operations whose outcome depends on more than metadata, or that change the metadata of an argument."""


@dataclass(frozen=True)
class _Made:
    """How to make one output: a new tensor, a view of an argument, an argument itself, or a plain value.

    Args:
        size: Size of a tensor.
        stride: Its stride.
        offset: Its offset in the storage.
        dtype: Its dtype.
        source: Number of the tensor argument that it is a view of; None for a new tensor.
        same: Whether it is that argument itself.
        value: Output that is no tensor.
    """

    size: torch.Size | None = None
    stride: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype = torch.float32
    source: int | None = None
    same: bool = False
    value: Any = None


_Outcome = tuple[type | None, tuple[_Made, ...]]
"""Type of the sequence of outputs, None for a single one, and how to make each."""

_UNKNOWN: _Outcome = (None, ())

_KNOWN: dict[Hashable, _Outcome | None] = {}
"""Outcomes by operation and metadata; None for operations that are called each time."""


class KnownCalls:
    """Operations of a mode, with the outcomes that are known from any mode of this process.

    Args:
        mode: Mode whose tensors are all on the CPU.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        template = FakeTensor(mode, torch.empty(0, device="meta"), _CPU)
        self._attributes = dict(template.__dict__)

    def call(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Call an operation as the mode does, or make its outputs as they were before."""
        if func is DEVICE_OF:
            return args[0].device
        tensors: list[Tensor] = []
        key: list[Any] = [func, torch.get_default_dtype()]
        if not (_describe(args, key, tensors) and (not kwargs or _describe(_flat(kwargs), key, tensors))):
            return self._mode.dispatch(func, types, args, kwargs)
        hashed = tuple(key)
        try:
            found = _KNOWN.get(hashed, _UNKNOWN)
        except TypeError:  # an argument that cannot be hashed
            return self._mode.dispatch(func, types, args, kwargs)
        if found is _UNKNOWN:
            made = self._mode.dispatch(func, types, args, kwargs)
            _KNOWN[hashed] = self._outcome(func, hashed, args, kwargs, tensors, made)
            return made
        if found is None:
            return self._mode.dispatch(func, types, args, kwargs)
        kind, outputs = found
        again = [self._make(output, tensors) for output in outputs]
        return again[0] if kind is None else kind(again)

    def _make(self, output: _Made, tensors: Sequence[Tensor]) -> Any:
        if output.size is None:
            return output.value
        if output.same:
            return tensors[output.source or 0]
        if output.source is None:
            bare = torch.empty_strided(output.size, output.stride, dtype=output.dtype, device="meta")
        else:
            bare = torch.empty(0, dtype=output.dtype, device="meta")
            bare.set_(tensors[output.source].untyped_storage(), output.offset, output.size, output.stride)
        tensor = Tensor._make_subclass(FakeTensor, bare, False, dispatch_device=True, device_for_backend_keys=_CPU)
        torch._C._set_throw_on_mutable_data_ptr(tensor)
        tensor.__dict__.update(self._attributes)
        return tensor

    def _outcome(
        self, func: Any, key: tuple[Any, ...], args: Any, kwargs: Any, tensors: list[Tensor], made: Any
    ) -> _Outcome | None:
        """How the outputs are made again; None if that is not certain to give the same."""
        if any(tag in func.tags for tag in _TAGS) or not torch._library.utils.is_builtin(func):
            return None
        after: list[Any] = [func, torch.get_default_dtype()]
        if (
            not (_describe(args, after, []) and (not kwargs or _describe(_flat(kwargs), after, [])))
            or tuple(after) != key
        ):
            return None  # it has changed an argument
        kind = type(made) if isinstance(made, tuple | list) else None
        outputs = made if kind else (made,)
        described = [self._described(output, tensors) for output in outputs]
        if None in described or kind not in (None, tuple, list):
            return None
        fresh = [id(output.untyped_storage()) for output, one in zip(outputs, described, strict=True) if _is_new(one)]
        if len(set(fresh)) < len(fresh):
            return None  # views of each other
        return kind, tuple(described)  # type: ignore[arg-type]

    def _described(self, output: Any, tensors: Sequence[Tensor]) -> _Made | None:
        if output is None or isinstance(output, int):
            return _Made(value=output)
        if type(output) is not FakeTensor or output.fake_mode is not self._mode:
            return None
        for number, tensor in enumerate(tensors):
            if output is tensor:
                return _Made(output.shape, source=number, same=True)
        if output.constant is not None or output.requires_grad or output.layout is not torch.strided:
            return None
        storage = output.untyped_storage()
        source = next((n for n, tensor in enumerate(tensors) if tensor.untyped_storage() is storage), None)
        one = _Made(output.shape, output.stride(), int(output.storage_offset()), output.dtype, source)
        again = self._make(one, tensors)
        same = (
            again.untyped_storage().nbytes() == storage.nbytes()
            and torch._C._dispatch_key_set(again) == torch._C._dispatch_key_set(output)
            and again.storage_offset() == one.offset
            and again.device == output.device
            and again.is_conj() == output.is_conj()
            and again.is_neg() == output.is_neg()
        )
        return one if same else None


def _is_new(output: _Made | None) -> bool:
    return output is not None and output.size is not None and output.source is None


def _flat(kwargs: Any) -> tuple[Any, ...]:
    return (*kwargs, *kwargs.values())


def _describe(args: Sequence[Any], key: list[Any], tensors: list[Tensor]) -> bool:
    """Append the metadata of arguments to a key and the tensors to a list; False for what metadata do not describe."""
    for arg in args:
        kind = arg.__class__
        if kind is FakeTensor:
            if arg.constant is not None or arg.fake_device != _CPU:
                return False
            key += (arg.dtype, arg.shape, arg.stride(), arg.storage_offset(), arg.requires_grad)
            tensors.append(arg)
        elif kind is list or kind is tuple:
            key += (kind, len(arg))
            if not _describe(arg, key, tensors):
                return False
        elif isinstance(arg, Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
            return False
        else:
            key += (kind, arg)
    return True
