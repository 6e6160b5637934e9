"""Tensors that are computed when their values are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten


class Deferred(Tensor):
    """A tensor of known shape whose values are read or computed by each call of :meth:`value`, and not kept.

    Operations on it give deferred tensors too. So a function that converts all weights of a checkpoint converts only names and
    shapes, and each result is computed by itself, from those weights alone that it is made of.

    Args:
        shown: Tensor of the same shape and dtype on the meta device.
        make: Function that returns the values.
    """

    _shown: Tensor
    _make: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, shown: Tensor, make: Callable[[], Tensor]) -> Deferred:
        made: Any = Tensor._make_wrapper_subclass(cls, shown.shape, strides=shown.stride(), dtype=shown.dtype)
        made._shown, made._make = shown, make
        return made

    def value(self) -> Tensor:
        """Read or compute the values; the result may share memory with the file that they are read from."""
        return self._make()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = (args, kwargs or {})

        def call(of: type[Tensor], convert: Callable[[Any], Tensor]) -> Any:
            own_args, own_kwargs = tree_map_only(of, convert, inputs)
            return func(*own_args, **own_kwargs)

        shown = call(Tensor, lambda tensor: tensor._shown if isinstance(tensor, Deferred) else tensor.to("meta"))
        outputs, structure = tree_flatten(shown)

        def make(number: int) -> Callable[[], Tensor]:
            return lambda: tree_flatten(call(Deferred, Deferred.value))[0][number]

        with torch.no_grad():
            deferred = [Deferred(output, make(number)) for number, output in enumerate(outputs)]
        return tree_unflatten(deferred, structure)
